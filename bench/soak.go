package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smolvm/smolvm"
)

const (
	// soakWriters are how many programs write files in each parent; its children have
	// them too.
	soakWriters = 2
	// Of so many saves one is a snapshot, and one a fork with several children.
	snapshotTurn, manyTurn = 5, 4
	manyChildren           = 3
	// answerTime is what a child may take to answer a command. It may be long: all CPUs
	// may have something else to do.
	answerTime = time.Minute
	// restTime is how long the parent writes between two saves, and a child until it is
	// asked again.
	restTime = 300 * time.Millisecond
)

// busyWriter makes, renames, replaces and appends to files, so that the kernel's own
// threads write to memory too, on every CPU.
const busyWriter = `mkdir -p /wr%[1]d; cd /wr%[1]d; (i=0; while :; do i=$((i+1)); ` +
	`echo $i >t; mv t f$((i%%50)); echo $i >>log; done) >/dev/null 2>&1 &`

// soaking is a run of soak.
type soaking struct {
	bench
	bad              []string // what went wrong
	saves, children  int
	compared, unlike int // saves whose memory was compared with the guest's, and was another
	holds            []time.Duration
}

// soak saves busy VMs with 2 and 4 CPUs again and again, on an idle host and on a loaded
// one, and checks that every child that is made of them works. What was saved is compared
// with the guests' memory by a test of package qemu, which is run as part of it.
func soak(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("soak", flag.ContinueOnError)
	saves := flags.Int("saves", 200, "how many forks and snapshots to make")
	compare := flags.Int("compare", 40, "how many saves to compare with the guest's memory")
	hosts := flags.String("host", "both", "idle: as it is; loaded: with every CPU kept busy; or both, half of the saves each")
	if err := flags.Parse(args); err != nil {
		return err
	}
	common, closeAll, err := openBench(ctx, "")
	if err != nil {
		return err
	}
	defer closeAll()
	s := &soaking{bench: common}
	states, known := map[string][]bool{"idle": {false}, "loaded": {true}, "both": {false, true}}[*hosts]
	if !known {
		return fmt.Errorf("-host is %q; it can be idle, loaded or both", *hosts)
	}
	cpuCounts := []int{2, 4}
	runs := len(states) * len(cpuCounts)
	for _, loaded := range states {
		stop := func() {}
		if loaded {
			stop = load()
		}
		for _, cpus := range cpuCounts {
			before, began := *s, time.Now()
			if err = s.parent(cpus, *saves/runs); err == nil {
				err = s.compare(cpus, *compare/runs)
			}
			if err != nil {
				break
			}
			host := map[bool]string{false: "idle", true: "loaded"}[loaded]
			fmt.Printf("%d CPUs, host %s: %s, in %s\n", cpus, host, s.since(before), time.Since(began).Round(time.Second))
		}
		stop()
		if err != nil {
			return err
		}
	}
	fmt.Println("in all:", s.since(soaking{}))
	for _, what := range s.bad {
		fmt.Println("bad:", what)
	}
	if len(s.bad) > 0 || s.unlike > 0 {
		return errors.New("some of the saved guests were not what they should be")
	}
	return nil
}

// since is the figures of what was done since then, on a line.
func (s *soaking) since(then soaking) string {
	holds := s.holds[len(then.holds):]
	text := fmt.Sprintf("%d saves, %d children, %d bad; memory compared %d times, %d differed",
		s.saves-then.saves, s.children-then.children, len(s.bad)-len(then.bad), s.compared-then.compared, s.unlike-then.unlike)
	if len(holds) > 0 {
		text += fmt.Sprintf("; held for %s, max %s", both(holds), ms(maxOf(holds)))
	}
	return text
}

func maxOf(times []time.Duration) (longest time.Duration) {
	for _, t := range times {
		longest = max(longest, t)
	}
	return longest
}

// load keeps all CPUs of the host busy until it is stopped.
func load() (stop func()) {
	var stopped atomic.Bool
	var group sync.WaitGroup
	for range runtime.NumCPU() {
		group.Go(func() {
			for !stopped.Load() {
				continue
			}
		})
	}
	return func() {
		stopped.Store(true)
		group.Wait()
	}
}

// parent makes a busy VM and saves it so many times.
func (s *soaking) parent(cpus, saves int) error {
	config := smolvm.VMConfig{VCPUs: cpus}
	parent, err := s.m.Create(s.ctx, config, smolvm.CreateOptions{})
	if err != nil {
		return err
	}
	defer func() { _ = s.m.Delete(context.WithoutCancel(s.ctx), parent.ID, smolvm.DeleteOptions{}) }()
	if _, err := s.m.Start(s.ctx, parent.ID, smolvm.StartOptions{}); err != nil {
		return err
	}
	for n := range soakWriters {
		if _, err := s.ask(parent.ID, fmt.Sprintf(busyWriter, n)); err != nil {
			return err
		}
	}
	for n := range saves {
		if err := s.wait(restTime); err != nil {
			return err
		}
		save := s.fork
		if n%snapshotTurn == 0 {
			save = s.snapshot
		}
		count := 1
		if n%manyTurn == 1 {
			count = manyChildren
		}
		if err := save(parent.ID, count); err != nil {
			if s.ctx.Err() != nil {
				return err
			}
			s.bad = append(s.bad, err.Error())
		}
		s.saves++
	}
	_, err = s.ask(parent.ID, "true")
	return err
}

func (s *soaking) fork(id string, children int) error {
	forked, err := s.m.Fork(s.ctx, id, smolvm.ForkOptions{Count: children})
	if err != nil {
		return err
	}
	s.holds = append(s.holds, forked.Pause)
	return s.check(forked.Children)
}

func (s *soaking) snapshot(id string, children int) (err error) {
	taken, err := s.m.CreateSnapshot(s.ctx, id, smolvm.SnapshotOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.m.RemoveSnapshot(context.WithoutCancel(s.ctx), taken.Name)) }()
	s.holds = append(s.holds, taken.Pause)
	var restored []smolvm.VMInfo
	for range children {
		vm, restoreErr := s.m.RestoreSnapshot(s.ctx, taken.Name, smolvm.RestoreOptions{})
		if restoreErr != nil {
			err = errors.Join(err, restoreErr)
			continue
		}
		restored = append(restored, vm)
	}
	return errors.Join(err, s.check(restored))
}

// check checks children and deletes them: they answer, at once and when they have worked
// for a while, their writers go on, and their kernels have nothing to complain of.
func (s *soaking) check(children []smolvm.VMInfo) error {
	var errs []error
	for _, child := range children {
		s.children++
		if warnings := child.Start.Warnings; len(warnings) > 0 {
			errs = append(errs, fmt.Errorf("VM %s: %q", child.ID, warnings))
		}
		errs = append(errs, s.works(child), s.m.Delete(context.WithoutCancel(s.ctx), child.ID, smolvm.DeleteOptions{}))
	}
	return errors.Join(errs...)
}

// complaint matches what a kernel says of memory that is not what it left there. That it
// has waited long for a CPU is none.
var complaint = regexp.MustCompile(`(?i)kernel panic|stack is corrupted|BUG: (unable|kernel|bad|scheduling|sleeping|workqueue leaked)|\bOops\b|general protection|EXT4-fs error|list_(add|del) corruption`)

func (s *soaking) works(child smolvm.VMInfo) error {
	before, err := s.ask(child.ID, "cat /wr*/log | wc -l")
	if err == nil {
		err = s.wait(restTime)
	}
	var after string
	if err == nil {
		after, err = s.ask(child.ID, "cat /wr*/log | wc -l")
	}
	if err == nil && after == before {
		err = fmt.Errorf("its writers have stopped at %s", before)
	}
	console, readErr := os.ReadFile(child.LogPath)
	if err == nil {
		err = readErr
	}
	if said := complaint.Find(console); said != nil {
		err = errors.Join(err, fmt.Errorf("its console has %q", said))
	}
	if err != nil {
		return fmt.Errorf("VM %s: %w", child.ID, err)
	}
	return nil
}

// ask runs a command of the shell in a VM and returns what it prints.
func (s *soaking) ask(id, command string) (string, error) {
	ctx, cancel := context.WithTimeout(s.ctx, answerTime)
	defer cancel()
	var output bytes.Buffer
	status, err := s.m.Exec(ctx, id, smolvm.Command{Args: []string{"sh", "-c", command}, Stdout: &output, Stderr: io.Discard})
	switch {
	case err != nil:
		return "", fmt.Errorf("exec %q: %w", command, err)
	case !status.Success():
		return "", fmt.Errorf("exec %q: %s", command, status)
	}
	return string(bytes.TrimSpace(output.Bytes())), nil
}

// compared matches what the test says at its end.
var compared = regexp.MustCompile(`of (\d+) saves of a guest with \d+ CPUs (\d+) were bad`)

// compare has the test run that compares what is saved with the guest's memory.
func (s *soaking) compare(cpus, saves int) error {
	name := fmt.Sprintf("^TestConformance$/^emulated_q35$/^save_a_busy_guest_with_%d_CPUs$", cpus)
	cmd := exec.CommandContext(s.ctx, "go", "test", "-count=1", "-timeout=2h", "-v", "-run", name, "./internal/vmm/qemu")
	cmd.Env = append(os.Environ(), "SMOLVM_TEST_BUSY_SAVES="+strconv.Itoa(saves))
	output, err := cmd.CombinedOutput()
	found := compared.FindSubmatch(output)
	if found == nil {
		return fmt.Errorf("compare the memory: %w: %s", err, output)
	}
	done, _ := strconv.Atoi(string(found[1]))
	bad, _ := strconv.Atoi(string(found[2]))
	s.compared, s.unlike = s.compared+done, s.unlike+bad
	return nil
}
