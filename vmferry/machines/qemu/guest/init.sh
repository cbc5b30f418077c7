#!/bin/busybox sh
# The first process of the Linux guest that demonstrations and tests move: it checks itself, and says so on ttyS0.
#
# Parameters, on the kernel's command line:
#   vf.files=N    files of 1 MiB with random content, checked again and again against the sums taken at first
#   vf.disk=NAME  a disk with a file system, such as vda, which is written to and read again without end
#   vf.writes=N   how many MiB a second another process copies and compares, and so rewrites in memory
#   vf.leave=N    as many files as leave N KiB of memory, instead of vf.files
#   vf.ip=A/N     the address of its first network interface
#   vf.echo=PORT  a TCP server that sends back what it gets
#   vf.dial=A:PORT
#                 connects there again and again, and keeps one more connection for as long as it lasts
#   vf.events=A   asks the metadata service at 169.254.169.254 for its events; A: ack, which approves them, or watch
# Kernel modules in /modules are loaded before all else, in the order of their names. QEMU's guest agent is started if
# it is there and the machine has a channel for it, and so is every program in /extra.
# What it says, one line each:
#   memory available=N         KiB of memory that are left, if vf.leave was given
#   ready files=N              the files are made
#   tick n=N up=S.CC gap=CC wall=S bad=N
#                              ten times a second; gap: centiseconds since the last tick, bad: all faults so far
#   check n=N begun=T bad=N    all files were read once more, begun after tick T
#   disk n=N name=F md5=SUM bad=N
#                              a file of the disk, written and brought to the disk before this is said; the last 16 stay
#   dial n=N answer=TEXT       what came back over the Nth connection; nothing if none could be made
#   held n=N ended=T           the connection that was kept ended at tick T, after N lines had come back
#   events n=N number=I status=S id=ID
#                              the Nth time it asked, what it was told is new: the document's number, and its first event
#   events n=N unanswered      the Nth time it asked, nothing came back
#   approved id=ID answer=TEXT what came back when it approved an event
#   BAD ...                    a fault, by name
export PATH=/bin
/bin/busybox mkdir -p /bin /proc /sys /data /state
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t tmpfs -o size=80% tmpfs /data
mount -t tmpfs tmpfs /state
for module in /modules/*.ko; do
  [ -e "$module" ] && insmod "$module"
done
# The agent sets the hardware clock by the program of this name, and refuses to set any clock without it.
mkdir -p /sbin
ln -s /bin/busybox /sbin/hwclock
if [ -e /bin/qemu-ga ]; then
  mount -t devtmpfs devtmpfs /dev
  mount -t sysfs sysfs /sys
  for port in /sys/class/virtio-ports/*; do
    read -r name <"$port/name" && [ "$name" = org.qemu.guest_agent.0 ] &&
      qemu-ga --method virtio-serial --path "/dev/${port##*/}" --statedir /state --logfile /state/agent.log &
  done
fi
for program in /extra/*; do
  [ -x "$program" ] && "$program" &
done
files=8 writes=0 disk='' leave='' ip='' echo='' dial='' events=''
for word in $(cat /proc/cmdline); do
  case $word in
    vf.disk=*) disk=${word#*=} ;;
    vf.files=*) files=${word#*=} ;;
    vf.writes=*) writes=${word#*=} ;;
    vf.leave=*) leave=${word#*=} ;;
    vf.ip=*) ip=${word#*=} ;;
    vf.echo=*) echo=${word#*=} ;;
    vf.dial=*) dial=${word#*=} ;;
    vf.events=*) events=${word#*=} ;;
  esac
done
touch /state/bad
n=0
echo $n >/state/tick

fault() {
  echo "BAD $*"
  echo "$*" >>/state/bad
}

wants_more() {
  [ -z "$leave" ] && { [ $i -lt "$files" ]; return; }
  while read -r name left rest; do
    [ "$name" = MemAvailable: ] && { [ "$left" -gt "$leave" ]; return; }
  done </proc/meminfo
}

i=0
while wants_more; do
  dd if=/dev/urandom of=/data/$i bs=64k count=16 2>/dev/null
  i=$((i + 1))
done
files=$i
cd /data && md5sum * >/state/sums
[ -n "$leave" ] && echo "memory available=$left"
echo "ready files=$files"

check() {
  k=0
  while :; do
    read -r begun </state/tick
    md5sum -c /state/sums >/state/found 2>&1 || fault "files: $(grep -v ': OK' /state/found | tr '\n' ' ')"
    k=$((k + 1))
    echo "check n=$k begun=$begun bad=$(wc -l </state/bad)"
    sleep 1
  done
}

write() {
  k=0
  pause=$((1000000 / writes))
  while :; do
    cp /data/$((k % files)) /state/copy$((k % 4))
    usleep $pause
    cmp -s /data/$((k % files)) /state/copy$((k % 4)) || fault "copy $k"
    k=$((k + 1))
  done
}

write_disk() {
  mkdir -p /disk
  [ -e /bin/qemu-ga ] || mount -t devtmpfs devtmpfs /dev
  until [ -e /dev/$disk ]; do usleep 50000; done
  mount -t ext4 /dev/$disk /disk || fault "mount $disk"
  k=0
  while :; do
    size=$((1 + k % 7))
    rm -f /disk/f$((k - 16))
    dd if=/dev/urandom of=/disk/f$k bs=16k count=$size conv=fsync 2>/dev/null || fault "disk write $k"
    sync
    sum=$(md5sum </disk/f$k)
    echo "${sum%% *}  /disk/f$k" >/state/disk$((k % 16))
    echo "disk n=$k name=f$k md5=${sum%% *} bad=$(wc -l </state/bad)"
    # Read from the disk itself, not from what the guest remembers of it.
    echo 3 >/proc/sys/vm/drop_caches
    cat /state/disk* | md5sum -c >/state/found-disk 2>&1 || fault "disk: $(grep -v ': OK' /state/found-disk | tr '\n' ' ')"
    k=$((k + 1))
  done
}

again() {
  k=0
  while :; do
    k=$((k + 1))
    echo "dial n=$k answer=$(echo "call $k" | timeout 2 nc -w 1 "${dial%:*}" "${dial#*:}" 2>/dev/null | head -n 1)"
    usleep 200000
  done
}

hold() {
  while echo held; do usleep 200000; done | nc "${dial%:*}" "${dial#*:}" >/state/held 2>/dev/null
  echo "held n=$(wc -l </state/held) ended=$(cat /state/tick)"
}

approve() {
  body="{\"StartRequests\":[{\"EventId\":\"$1\"}]}"
  answer=$(printf 'POST /metadata/scheduledevents?api-version=2020-07-01 HTTP/1.1\r\nHost: %s\r\nMetadata: true\r\nContent-Length: %d\r\n\r\n%s' \
    $metadata ${#body} "$body" | timeout 3 nc $metadata 80 | head -n 1 | tr -d '\r')
  echo "approved id=$1 answer=$answer"
}

watch_events() {
  k=0 metadata=169.254.169.254 seen=''
  while :; do
    k=$((k + 1))
    # Debian's static busybox crashes at wget's own -T.
    if timeout 3 wget -q -O /state/events --header 'Metadata: true' \
      "http://$metadata/metadata/scheduledevents?api-version=2020-07-01" 2>/dev/null; then
      told=$(cat /state/events)
      number=${told#*DocumentIncarnation\":} id=none status=none
      case $told in
        *EventId*)
          id=${told#*EventId\":\"} status=${told#*EventStatus\":\"}
          ;;
      esac
      now="number=${number%%,*} status=${status%%\"*} id=${id%%\"*}"
      [ "$now" = "$seen" ] || echo "events n=$k $now"
      seen=$now
      [ "$events ${status%%\"*}" = "ack Scheduled" ] && approve "${id%%\"*}"
    else
      echo "events n=$k unanswered"
    fi
    usleep 300000
  done
}

check &
[ -n "$disk" ] && write_disk &
[ "$writes" -gt 0 ] && write &
if [ -n "$ip" ]; then
  ip link set lo up
  ip addr add "$ip" dev eth0
  ip link set eth0 up
fi
[ -n "$echo" ] && nc -ll -p "$echo" -e cat &
[ -n "$events" ] && watch_events &
if [ -n "$dial" ]; then
  again &
  hold &
fi

read -r up rest </proc/uptime
last=${up%.*}${up#*.}
while :; do
  usleep 100000
  read -r up rest </proc/uptime
  now=${up%.*}${up#*.}
  [ "$now" -ge "$last" ] || fault "time went back from $last to $now"
  n=$((n + 1))
  echo $n >/state/tick
  echo "tick n=$n up=$up gap=$((now - last)) wall=$(date +%s) bad=$(wc -l </state/bad)"
  last=$now
done
