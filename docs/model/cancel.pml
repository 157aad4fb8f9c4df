/*
 * The protocol of one job: an api that cancels it, two workers, their watchdogs, BullMQ, the reconciler, and
 * what may go wrong. Run by check.sh. Each transition names the code that it stands for; one that is a single
 * statement in Postgres or Redis is atomic here, and nothing else is.
 *
 * What may go wrong: one worker dies for good at any moment; each freezes once and thaws; Redis is wiped once;
 * the queue entry of a cancelled job is not removed; the answer to a claim is lost. A lost doorbell needs no
 * variable: a worker learns of a cancel at any later moment (doorbell, poll), or never before its task ends.
 */
#define ATTEMPTS 3 /* MAX_ATTEMPTS */

mtype = { queued, processing, completed, failed, cancelled };
mtype = { absent, waiting, held };

/* The row in Postgres. */
mtype status = queued;
byte current = 0; /* run_id: the number of the newest claim, 0 for none */
byte owner = 0; /* worker_id */
byte attempt = 0;
bool scenario = false;
bool stopped = false; /* stopped_at */

/* The entry in BullMQ. */
mtype entry = waiting;
byte holder = 0;

/* The workers and the processes of their tasks; 0 is nobody. */
bool alive[3] = true;
bool frozen[3] = false;
bool task[3] = false;

/* What the caller was told. */
bool said200 = false;

#define OPEN (status == queued || status == processing)
#define UP (alive[w] && !frozen[w])
#define MINE (status == processing && current == mine)
#define LOST(o) (!alive[o] || frozen[o])
/* Not heard of for WORKER_LOST_MS: by then its watchdog has ended its tasks. */
#define GONE(o) (LOST(o) && !task[o])
#define CLAIMABLE (status == queued || (status == processing && GONE(owner)))

/* worker/queue-consumer.ts, worker/run-job.ts, worker/cancel-listener.ts */
proctype Worker(byte w) {
  byte mine;
  bool spins, again;
end:
  do
  :: !alive[w] -> break
  :: atomic { UP && entry == waiting -> entry = held; holder = w; again = false; mine = 0 } /* BullMQ: moveToActive */
     if /* RunRepository.claim */
     :: atomic { UP && CLAIMABLE && attempt < ATTEMPTS ->
          attempt++; mine = attempt; current = mine; owner = w; status = processing }
     :: atomic { UP && CLAIMABLE && attempt == ATTEMPTS ->
          mine = attempt + 1; current = mine; owner = w; status = processing } /* one claim too many: */
        if
        :: atomic { UP && MINE -> status = failed; goto drop } /* WORKER_LOST */
        :: UP && !MINE -> goto confirm
        :: !alive[w] -> goto dead
        fi
     :: UP && OPEN && !CLAIMABLE -> again = true; goto drop /* taken */
     :: UP && !OPEN -> goto drop /* refused */
     :: !alive[w] -> goto dead
     fi;
     if
     :: UP -> task[w] = true; /* new TaskProcess */
        if :: spins = true :: spins = false fi
     :: UP -> goto interrupt /* the answer was lost; the poll finds a run that nobody runs */
     :: !alive[w] -> goto dead
     fi;
     if
     :: UP && task[w] && !spins -> task[w] = false; goto record /* the task ends by itself */
     :: UP && task[w] && spins && !said200 -> task[w] = false; goto record /* TASK_TIMEOUT */
     :: UP && !task[w] -> goto interrupt /* the watchdog took this worker for dead */
     :: UP && task[w] && !MINE -> task[w] = false; goto confirm /* CancelListener, then TaskProcess.stop */
     :: !alive[w] -> goto dead
     fi;
record:
     if
     :: atomic { UP && MINE -> assert(current == mine); status = completed; scenario = true; goto drop } /* RunRepository.complete */
     :: atomic { UP && MINE -> status = failed; goto drop } /* RunRepository.fail */
     :: atomic { UP && MINE && attempt < ATTEMPTS -> status = queued; current = 0; owner = 0; again = true; goto drop } /* requeue */
     :: UP && !MINE -> goto confirm /* refused: a late result */
     :: !alive[w] -> goto dead
     fi;
interrupt:
     if
     :: atomic { UP && MINE -> status = queued; current = 0; owner = 0; again = true; goto drop } /* requeue */
     :: UP && !MINE -> goto confirm
     :: !alive[w] -> goto dead
     fi;
confirm:
     if /* RunRepository.confirmStopped */
     :: atomic { UP && status == cancelled && current == mine -> assert(!task[w]); stopped = true }
     :: UP && !(status == cancelled && current == mine) -> skip
     :: !alive[w] -> goto dead
     fi;
drop:
     if /* BullMQ: moveToCompleted or moveToDelayed, refused when the lock is another's */
     :: atomic { UP && entry == held && holder == w ->
          if :: again -> entry = waiting :: else -> entry = absent fi; holder = 0 }
     :: UP && !(entry == held && holder == w) -> skip
     :: !alive[w] -> goto dead
     fi
  od;
dead:
  skip
}

/* main.watchdog.ts */
proctype Watchdog(byte w) {
end:
  do
  :: atomic { task[w] && LOST(w) -> task[w] = false }
  od
}

/* api/cancel-job.ts: at any moment, or never */
proctype Canceller() {
  bool ran;
  if
  :: atomic { OPEN -> status = cancelled; said200 = true; ran = (current != 0) } /* JobRepository.cancel */
     if
     :: atomic { !ran && entry == waiting -> entry = absent } /* JobQueue.remove */
     :: skip /* not removable, or Redis is away */
     fi
  :: !OPEN -> skip /* 400 */
  :: skip
  fi
}

/* BullMQ's stalled check */
proctype Stalled() {
end:
  do
  :: atomic { entry == held && LOST(holder) -> entry = waiting; holder = 0 }
  od
}

/* worker/reconciler.ts, confirmLost */
proctype Sweep() {
end:
  do
  :: atomic { status == cancelled && current != 0 && !stopped && GONE(owner) -> stopped = true } /* worker_lost */
  od
}

/* JobQueue.remove: what is held has a lock */
inline removeEntry() { atomic { if :: entry == waiting -> entry = absent :: else -> skip fi } }

/* worker/reconciler.ts, repairQueue: Postgres and Redis are asked in turns, and what they say may be old by then */
proctype Repair() {
  byte lost;
end:
  do
  :: atomic { status == queued -> lost = 0 } /* RepairRepository.findDependingOnQueue */
     goto missing
  :: atomic { status == processing && LOST(owner) -> lost = current }
missing:
     if /* JobQueue.missing */
     :: entry != absent -> goto done
     :: entry == absent -> skip
     fi;
     atomic { /* RepairRepository.requeueLost */
       if
       :: lost != 0 && status == processing && current == lost && LOST(owner) -> status = queued; current = 0; owner = 0
       :: else -> skip
       fi };
     if /* RepairRepository.queuedAmong */
     :: status != queued -> goto done
     :: status == queued -> skip
     fi;
     removeEntry(); /* JobQueue.addAgain */
     atomic { if :: entry == absent -> entry = waiting :: else -> skip fi }; /* added */
     if /* takeBack */
     :: status != queued -> removeEntry()
     :: status == queued -> skip
     fi;
done:
     skip
  od
}

proctype Faults() {
  byte w = 1;
  if :: alive[1] = false :: skip fi;
  do
  :: w == 3 -> break
  :: w < 3 ->
     if
     :: frozen[w] = true; frozen[w] = false
     :: skip
     fi;
     w++
  od
}

proctype Wipe() {
  if :: atomic { entry = absent; holder = 0 } :: skip fi
}

/* Goes on when nothing else can, so that a state in which all are stuck is a cycle that the checks see. */
proctype Time() {
  do
  :: attempt <= ATTEMPTS
  od
}

init {
  atomic {
    run Worker(1); run Worker(2); run Watchdog(1); run Watchdog(2);
    run Canceller(); run Stalled(); run Sweep(); run Repair(); run Faults(); run Wipe(); run Time()
  }
}

/* After the 200 the job stays cancelled, and a scenario exists only of a completed job. */
ltl safe { [] ((said200 -> status == cancelled) && (scenario -> status == completed) && (stopped -> said200)) }
/* Every job ends. */
ltl ends { <> (!OPEN) }
/* After the 200 every process dies, for good. */
ltl dies { [] (said200 -> <> [] (!task[1] && !task[2])) }
/* A cancelled run is confirmed to be gone. */
ltl confirmed { [] ((said200 && current != 0) -> <> stopped) }
