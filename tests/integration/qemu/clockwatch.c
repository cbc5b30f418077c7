/* For tests: reads the guest's time of day a thousand times a second, and says how often it stepped back. */
#include <stdio.h>
#include <time.h>

int main(void) {
  const struct timespec nap = {0, 1000000};
  long long before = 0, worst = 0;
  unsigned long long back = 0;
  for (unsigned long long n = 1;; n++) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    const long long ns = now.tv_sec * 1000000000LL + now.tv_nsec;
    if (ns < before) {
      back++;
      if (before - ns > worst) worst = before - ns;
    }
    before = ns;
    if (n % 100 == 0) {
      printf("clock n=%llu ns=%lld back=%llu worst=%lld\n", n, ns, back, worst);
      fflush(stdout);
    }
    nanosleep(&nap, NULL);
  }
}
