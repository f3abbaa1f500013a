package guest

import (
	"errors"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// reaper starts processes and collects their exit statuses. As PID 1 it collects
// those of everybody: an orphan becomes PID 1's child, and stays a zombie unless
// PID 1 waits for it. So there it is the only one that may wait.
type reaper struct {
	all    bool // collect every child, not only those that were started here
	groups cgroups
	// servesFiles reports whether the kernel asks this process for files that commands may need to
	// be started: see launch. Nil: it does not.
	servesFiles func() bool

	mu      sync.Mutex // held while forking, so that no status comes before its waiter
	waiters map[int]chan<- unix.WaitStatus
	started *sync.Cond // a child was started
	idle    *sync.Cond // there are no children
	any     bool
}

func newReaper(all bool) *reaper {
	r := &reaper{all: all, waiters: map[int]chan<- unix.WaitStatus{}}
	r.started, r.idle = sync.NewCond(&r.mu), sync.NewCond(&r.mu)
	if all {
		go r.collect()
	}
	return r
}

// start forks by fork. The channel gets the exit status, once.
func (r *reaper) start(fork func() (int, error)) (int, <-chan unix.WaitStatus, error) {
	status := make(chan unix.WaitStatus, 1)
	r.mu.Lock()
	defer r.mu.Unlock()
	runtime.LockOSThread()
	resetTimerSlack()
	pid, err := fork()
	runtime.UnlockOSThread()
	if err != nil {
		return 0, nil, err
	}
	if r.all {
		r.waiters[pid] = status
		r.any = true
		r.started.Signal()
	} else {
		go waitOne(pid, status)
	}
	return pid, status, nil
}

func waitOne(pid int, status chan<- unix.WaitStatus) {
	for {
		var got unix.WaitStatus
		_, err := unix.Wait4(pid, &got, 0, nil)
		if !errors.Is(err, unix.EINTR) {
			status <- got
			return
		}
	}
}

// collect waits for any child, for ever.
func (r *reaper) collect() {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil: // ECHILD: nobody to wait for
			r.mu.Lock()
			// A child may have been started since; then there is one again.
			if r.any = len(r.waiters) > 0; !r.any {
				r.idle.Broadcast()
				r.started.Wait()
			}
			r.mu.Unlock()
		default:
			r.mu.Lock()
			if waiter := r.waiters[pid]; waiter != nil {
				delete(r.waiters, pid)
				waiter <- status
			}
			r.mu.Unlock()
		}
	}
}

// waitIdle returns when there are no children at all; only of use to PID 1.
func (r *reaper) waitIdle() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.any {
		r.idle.Wait()
	}
}
