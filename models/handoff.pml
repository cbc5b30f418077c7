/* The hand-off between HOSTS hosts by their journals, ATTEMPTS attempts in any direction, checked by Spin.
 *
 * A second opinion: the same protocol as models/rules.py, told by the states of both ends rather than by events, and
 * searched by another program.
 *
 * - A message, once sent, may be taken late, twice or never: messages are facts that are never forgotten.
 * - A crash takes the guest of a host, and its lazy records SEALED and PREPARED, or not them.
 * - A killed service takes no step for a while; a timer or a cancellation is a step that is possible at any time.
 * - With OPERATOR somebody may cut a host's power for good and force the other one; what then runs there starts anew.
 *   Of three hosts two could be forced, one after the other: nothing but that person can know of the first.
 * - Left out, and explored by models/world.py: lost journals, torn ends, an operator who forces one host while the
 *   other one runs.
 *
 * Asserted: I1 one guest runs, I1b one host is permitted, I2 nothing stale is resumed and no right taken without a copy,
 * I3 no step takes the last usable copy away.
 *
 * python -m models runs it; by hand: spin -a handoff.pml && gcc -O2 -w -DSAFETY -o pan pan.c && ./pan -m100000
 * Each BUG_... (spin -a -DBUG_TIMEOUT handoff.pml) removes one guard and must give an assertion violation; its shortest
 * trace: compile with -DREACH too, ./pan -i -m100000, then spin -t -DBUG_... handoff.pml.
 */
#ifndef HOSTS
#define HOSTS 2
#endif
#ifndef ATTEMPTS
#define ATTEMPTS 2
#endif
#ifndef CRASHES
#define CRASHES 2
#endif
#if defined(OPERATOR) || defined(BUG_FORCE_UNFENCED) || defined(BUG_FORCE_WITH_MEMORY)
#define POWER_CUT 1
#else
#define POWER_CUT 0
#endif
#define NONE ATTEMPTS

#define ABSENT 0
#define PAUSED 1
#define RUNNING 2

mtype = { quiet, begun, sealed, handed_off };                        /* a source's journal */
mtype = { unseen, receiving, prepared, owned, ran, refused };         /* a destination's, per attempt */

byte vm[HOSTS], held[HOSTS];           /* the guest here, and the number of the state it is in */
mtype phase[HOSTS] = quiet;
byte opened[HOSTS] = NONE;             /* the source's open attempt */
byte granted[HOSTS], left[HOSTS];      /* the newest right granted, and given up, by the journals here */
bool lazy_out[HOSTS], lazy_in[HOSTS];  /* the last record may be lost in a crash */
byte newest[HOSTS] = NONE;             /* the newest attempt begun here as a destination */
bool off[HOSTS];                       /* an operator has cut its power, and will never give it back */

byte used = 0;                         /* attempts so far */
byte from[ATTEMPTS], to[ATTEMPTS], epoch[ATTEMPTS], state[ATTEMPTS];
mtype stands[ATTEMPTS] = unseen;
bool said_begin[ATTEMPTS], said_seal[ATTEMPTS], said_go[ATTEMPTS], said_abort[ATTEMPTS];
bool said_accepted[ATTEMPTS], said_ready[ATTEMPTS], said_owned[ATTEMPTS], said_running[ATTEMPTS];
bool said_refused[ATTEMPTS];

byte latest = 0, crashes = 0;
bool lost = 0;

#define ARRIVING(h) (newest[h] != NONE && (stands[newest[h]] == receiving || stands[newest[h]] == prepared))
#define MOVED_ON(h) (phase[h] == handed_off && newest[h] != NONE && epoch[newest[h]] > epoch[opened[h]])
#define LEAVING(h) (phase[h] != quiet && !MOVED_ON(h))
#define OWNER(h) (granted[h] > left[h])
#define MAY_RUN(h) (OWNER(h) && !LEAVING(h) && !off[h])
#define HELD_THERE(h) (newest[h] != NONE && \
    (stands[newest[h]] == prepared || stands[newest[h]] == owned || stands[newest[h]] == ran) && \
    LEAVING(from[newest[h]]) && opened[from[newest[h]]] == newest[h])
#define USABLE(h) (vm[h] != ABSENT && held[h] == latest && \
    (MAY_RUN(h) || (LEAVING(h) && !said_running[opened[h]]) || HELD_THERE(h)))
/* A Begin of a later right than the one that was handed off proves that the hand-off was completed. */
#define SPENT(h, k) (phase[h] == handed_off && !OWNER(h) && epoch[k] > epoch[opened[h]])
#define ADMITS(h, k) ((!OWNER(h) && !LEAVING(h) && (vm[h] == ABSENT || ARRIVING(h))) || SPENT(h, k))
#define TAKEN(k) (stands[k] == owned || stands[k] == ran)
#ifdef BUG_NO_ORDER
#define NEWER(h, k) (newest[h] != k && stands[k] == unseen)
#else
#define NEWER(h, k) (stands[k] == unseen && (newest[h] == NONE || \
    (k > newest[h] && (!TAKEN(newest[h]) || epoch[k] > epoch[newest[h]]))))
#endif
#if HOSTS == 2
#define COUNT(P) (P(0) + P(1))
#define ELSEWHERE(h) USABLE(1 - h)
#else
#define COUNT(P) (P(0) + P(1) + P(2))
#define ELSEWHERE(h) ((h != 0 && USABLE(0)) || (h != 1 && USABLE(1)) || (h != 2 && USABLE(2)))
#endif
#define RUNS(h) (vm[h] == RUNNING)
#ifdef BUG_TIMEOUT
#define TIMEOUT 1
#else
#define TIMEOUT 0
#endif
#ifdef BUG_DISCARD
#define DISCARD 1
#else
#define DISCARD 0
#endif
#ifdef BUG_CLOSE_ALONE
#define ALONE 1
#else
#define ALONE 0
#endif
#ifdef BUG_OPEN_GATE
#define GATE(h) (OWNER(h) && !off[h])
#else
#define GATE(h) MAY_RUN(h)
#endif
#ifdef BUG_NO_COPY
#define COPY(h) 1
#else
#define COPY(h) (vm[h] == PAUSED)
#endif
#ifdef BUG_RELEASE_ARRIVED
#define RELEASABLE(h) (vm[h] == PAUSED)
#else
#define RELEASABLE(h) (vm[h] == PAUSED && !ARRIVING(h) && !OWNER(h))
#endif

#ifdef BUG_FORCE_UNFENCED
#define FENCED(h) 1
#else
#define FENCED(h) off[h]
#endif
#ifdef BUG_FORCE_WITH_MEMORY
#define NOTHING_LEFT(h) 1
#else
#define NOTHING_LEFT(h) (vm[h] == ABSENT)
#endif

inline start(h) { latest++; held[h] = latest; vm[h] = RUNNING; lost = 0 }
inline drop(h) { vm[h] = ABSENT; held[h] = 0 }
inline close(h) { phase[h] = quiet; opened[h] = NONE; lazy_out[h] = 0 }

inline faults(h) {
  if
  :: crashes < CRASHES && vm[h] != ABSENT ->
       printf("crash@%d\n", h);
       lost = lost || vm[h] == RUNNING || !ELSEWHERE(h);
       drop(h); crashes++;
       if :: lazy_out[h] && phase[h] == sealed -> phase[h] = begun :: skip fi;
       if :: lazy_in[h] && newest[h] != NONE && stands[newest[h]] == prepared -> stands[newest[h]] = receiving
          :: skip fi;
       lazy_out[h] = 0; lazy_in[h] = 0
  :: GATE(h) && vm[h] == PAUSED -> printf("resume@%d\n", h); assert(held[h] == latest) /* I2 */; start(h)
  :: MAY_RUN(h) && vm[h] == ABSENT -> printf("cold-boot@%d\n", h); start(h)
  :: vm[h] == PAUSED && !ARRIVING(h) && !OWNER(h) && !LEAVING(h) -> printf("discard@%d\n", h); drop(h)
  :: else
  fi
}

/* Whoever cuts a host's power says that what it alone had is given up. */
inline operator(h, k) {
  if
  :: crashes < CRASHES && used > 0 ->
       printf("power-off@%d\n", h); off[h] = 1; lost = 1; drop(h); crashes++;
       lazy_out[h] = 0; lazy_in[h] = 0
  :: opened[h] == k && (phase[h] == sealed || phase[h] == handed_off) && off[to[k]] && vm[h] == PAUSED ->
       printf("operator-ends-it@%d\n", h); drop(h); lost = 1
  :: opened[h] == k && !MOVED_ON(h) && FENCED(to[k]) && NOTHING_LEFT(h) ->
       printf("force-reclaim%d@%d\n", k, h); granted[h] = epoch[k] + 2; close(h); said_abort[k] = 1
  :: newest[h] == k && (stands[k] == prepared || stands[k] == refused) && FENCED(from[k]) ->
       printf("force-accept%d@%d\n", k, h);
       if :: vm[h] == PAUSED && NOTHING_LEFT(h) -> skip :: else -> drop(h) fi;
       stands[k] = owned; granted[h] = epoch[k] + 1; lazy_in[h] = 0; said_owned[k] = 1
  :: else
  fi
}

inline source(h, d, k) {
  if
  :: k == used && d != h && MAY_RUN(h) && phase[h] == quiet && vm[h] == RUNNING ->
       printf("begin%d-to-%d@%d\n", k, d, h);
       from[k] = h; to[k] = d; epoch[k] = granted[h]; used++;
       phase[h] = begun; opened[h] = k; said_begin[k] = 1
  :: opened[h] == k && phase[h] == begun && vm[h] == RUNNING && said_accepted[k] ->
       printf("pause%d@%d\n", k, h); vm[h] = PAUSED
  :: opened[h] == k && phase[h] == begun && vm[h] == PAUSED ->
       printf("sealed%d@%d\n", k, h);
       phase[h] = sealed; lazy_out[h] = 1; state[k] = held[h]; said_seal[k] = 1
  /* with the memory alone, without it by the destination's word */
  :: opened[h] == k && (phase[h] == begun || phase[h] == sealed) &&
     (vm[h] != ABSENT || said_refused[k] || ALONE) ->
       printf("aborted%d@%d\n", k, h); close(h); said_abort[k] = 1
  :: opened[h] == k && said_ready[k] && (phase[h] == sealed || (phase[h] == begun && vm[h] == ABSENT)) ->
       printf("handed-off%d@%d\n", k, h);
#ifdef BUG_GO_FIRST
       said_go[k] = 1
#else
       phase[h] = handed_off; lazy_out[h] = 0; said_go[k] = 1;
       left[h] = (epoch[k] > left[h] -> epoch[k] : left[h])
#ifdef BUG_FREE_EARLY
       ; drop(h)
#endif
#endif
  :: opened[h] == k && phase[h] == handed_off && (said_refused[k] || TIMEOUT) ->
       printf("reclaimed%d@%d\n", k, h); granted[h] = epoch[k] + 2; close(h)
  :: opened[h] == k && phase[h] == handed_off && (said_running[k] || MOVED_ON(h)) ->
       printf("done%d@%d\n", k, h); close(h); if :: RELEASABLE(h) -> drop(h) :: else fi
  :: else
  fi
}

inline destination(h, k) {
  if
  :: k < used && to[k] == h && said_begin[k] && NEWER(h, k) && ADMITS(h, k) ->
       printf("accepted%d@%d\n", k, h);
       if :: ARRIVING(h) -> stands[newest[h]] = refused; said_refused[newest[h]] = 1; drop(h)
          :: !ARRIVING(h) && vm[h] == PAUSED -> drop(h)
          :: else fi;
       newest[h] = k; stands[k] = receiving; lazy_in[h] = 0; said_accepted[k] = 1
  :: k < used && newest[h] == k && stands[k] == receiving && said_seal[k] && vm[h] == ABSENT ->
       printf("prepared%d@%d\n", k, h);
       vm[h] = PAUSED; held[h] = state[k]; stands[k] = prepared; lazy_in[h] = 1; said_ready[k] = 1
  :: k < used && newest[h] == k && stands[k] == prepared && said_go[k] && COPY(h) ->
       printf("owned%d@%d\n", k, h);
       assert(vm[h] == PAUSED) /* I2 */;
       stands[k] = owned; granted[h] = epoch[k] + 1; lazy_in[h] = 0; said_owned[k] = 1
  :: k < used && newest[h] == k && stands[k] == owned && (vm[h] == RUNNING || LEAVING(h) || !OWNER(h)) ->
       printf("ran%d@%d\n", k, h); stands[k] = ran; said_running[k] = 1
  :: k < used && newest[h] == k && (stands[k] == receiving ||
     (stands[k] == prepared && (said_abort[k] || vm[h] == ABSENT || DISCARD))) ->
       printf("refused%d@%d\n", k, h);
       if :: vm[h] == PAUSED -> drop(h) :: else fi;
       stands[k] = refused; lazy_in[h] = 0; said_refused[k] = 1
  /* a question about an attempt that was never begun here closes it, and older ones of its source */
  :: k < used && to[k] == h && NEWER(h, k) ->
       printf("closed%d@%d\n", k, h);
       if :: ARRIVING(h) && from[newest[h]] == from[k] ->
               stands[newest[h]] = refused; said_refused[newest[h]] = 1; drop(h)
          :: else fi;
       stands[k] = refused; said_refused[k] = 1
  :: k < used && to[k] == h && stands[k] == unseen && !NEWER(h, k) -> said_refused[k] = 1
  :: else
  fi
}

active proctype world() {
  byte h, d, k;
  atomic { vm[0] = RUNNING; granted[0] = 1 };
  do
  :: atomic {
       select(h : 0 .. HOSTS - 1);
       if
       :: off[h]
       :: !off[h] -> faults(h)
       :: !off[h] -> select(d : 0 .. HOSTS - 1); select(k : 0 .. ATTEMPTS - 1); source(h, d, k)
       :: !off[h] -> select(k : 0 .. ATTEMPTS - 1); destination(h, k)
       :: POWER_CUT && !off[h] -> select(k : 0 .. ATTEMPTS - 1); operator(h, k)
       fi;
       h = 0; d = 0; k = 0;
       assert(COUNT(RUNS) <= 1);                       /* I1  */
       assert(COUNT(MAY_RUN) <= 1);                    /* I1b */
       assert(lost || COUNT(USABLE) > 0)               /* I3  */
     }
  od
}
