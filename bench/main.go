// Bench measures smolvm on this host and prints a table. Times of different runs
// can't be compared on shared machines, so what matters is a ratio of two times that
// were measured by turns in the same run.
//
//	make bench
//	make bench BENCH="-only starts,list"
//
// With the argument soak it saves busy VMs instead, some hundred times:
//
//	make soak
//
// With the argument backends it compares the backends of a host, as scripts/bench-kvm.sh does, and
// with kernels a kernel that was built for guests with the distribution's:
//
//	make bench-kernel
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
	"github.com/smolvm/smolvm/shim"
)

const (
	coldRuns = 15
	quickRun = 100
	manyVMs  = 10_000
	// An exec is measured in turns with what the guest does by itself, as a guest's speed
	// changes by half from one second to the next: so many turns, of so many execs, and of
	// so many forks and execs in the guest.
	execTurns, execTurn, guestLoop = 20, 15, 100
)

func main() {
	shim.Main() // backends are measured with this program as the shim
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	task, args := run, os.Args[1:]
	if len(args) > 0 {
		if other := map[string]func(context.Context, []string) error{"soak": soak, "backends": backends, "mounts": mounts, "kernels": kernels}[args[0]]; other != nil {
			task, args = other, args[1:]
		}
	}
	err := task(ctx, args)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench holds what all measurements use.
type bench struct {
	ctx  context.Context // of the whole run
	m    *manager.Manager
	dir  string
	rows [][3]string
	// program is the path of the smolvm program.
	program string
	// image is what VMs boot. Empty: the default one.
	image string

	coldStart, clone time.Duration // medians
}

// run measures, and prints a table.
func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	only := flags.String("only", "", "measure only these parts, as in starts,list")
	if err := flags.Parse(args); err != nil {
		return err
	}
	b, closeAll, err := openBench(ctx, "")
	if err != nil {
		return err
	}
	defer closeAll()
	for _, part := range []struct {
		name    string
		measure func() error
	}{
		{"calls", b.calls},
		{"cold", b.cold},
		{"warm", b.warm},
		{"starts", b.starts},
		{"pool", b.pool},
		{"forks", b.forks},
		{"together", b.together},
		{"command", b.command},
		{"list", b.list},
	} {
		if *only != "" && !slices.Contains(strings.Split(*only, ","), part.name) {
			continue
		}
		if err := part.measure(); err != nil {
			return err
		}
	}
	status("")
	fmt.Println("| What | Measured | Target |\n|---|---|---|")
	for _, row := range b.rows {
		fmt.Printf("| %s | %s | %s |\n", row[0], row[1], row[2])
	}
	return nil
}

// openBench opens a Manager, as open does, whose shims are the smolvm program.
func openBench(ctx context.Context, images string) (_ bench, closeAll func(), err error) {
	program, err := filepath.Abs("bin/smolvm")
	if err != nil {
		return bench{}, nil, err
	}
	m, dir, closeAll, err := open(ctx, manager.Config{ShimCommand: []string{program, "smolvm-shim"}, AgentPath: agentPath()}, images)
	return bench{ctx: ctx, m: m, dir: dir, program: program}, closeAll, err
}

// open opens a Manager on a directory of its own, which closeAll removes. The images are those
// of another data directory; empty: the default one is made.
func open(ctx context.Context, config manager.Config, images string) (_ *manager.Manager, dir string, closeAll func(), err error) {
	if dir, err = os.MkdirTemp("", "smolvm-bench-"); err != nil {
		return nil, "", nil, err
	}
	config.DataDir, config.SocketDir = filepath.Join(dir, "data"), filepath.Join(dir, "run")
	if images != "" {
		err = os.Mkdir(config.DataDir, 0o700)
		if err == nil {
			err = os.Symlink(filepath.Join(images, "images"), filepath.Join(config.DataDir, "images"))
		}
	}
	var m *manager.Manager
	if err == nil {
		m, err = manager.Open(ctx, config)
	}
	if err != nil {
		return nil, "", nil, errors.Join(err, os.RemoveAll(dir))
	}
	closeAll = func() {
		removeVMs(context.WithoutCancel(ctx), m) // of a part that has failed, or was interrupted
		_, _ = m.Close(), os.RemoveAll(dir)
	}
	if images != "" {
		return m, dir, closeAll, nil
	}
	if _, err := m.BuildImage(ctx, smolvm.BuildOptions{Progress: func(p smolvm.Progress) { status("%s", p.Phase) }}); err != nil {
		closeAll()
		return nil, "", nil, err
	}
	return m, dir, closeAll, nil
}

// removeVMs removes all VMs.
func removeVMs(ctx context.Context, m *manager.Manager) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	vms, err := m.List(ctx, smolvm.ListOptions{})
	for _, vm := range vms {
		err = errors.Join(err, m.Delete(ctx, vm.ID, smolvm.DeleteOptions{}))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench: left behind:", err)
	}
}

func (b *bench) row(what, measured, target string) {
	status("")
	fmt.Fprintf(os.Stderr, "%s: %s\n", what, measured)
	b.rows = append(b.rows, [3]string{what, measured, target})
}

// repeat measures n runs of f.
func repeat(n int, f func() error) ([]time.Duration, error) {
	times := make([]time.Duration, 0, n)
	for range n {
		began := time.Now()
		if err := f(); err != nil {
			return nil, err
		}
		times = append(times, time.Since(began))
	}
	return times, nil
}

func median(times []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(times))
	return sorted[len(sorted)/2]
}

// p95 is what 95 of 100 stay below.
func p95(times []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(times))
	return sorted[(len(sorted)*95-1)/100]
}

// both are the median and the 95th percentile, in words.
func both(times []time.Duration) string { return ms(median(times)) + ", p95 " + ms(p95(times)) }

func ratio(a, b time.Duration) string { return fmt.Sprintf("%.3g ×", float64(a)/float64(b)) }

// calls measures Create and Get.
func (b *bench) calls() error {
	var ids []string
	times, err := repeat(quickRun, func() error {
		vm, err := b.m.Create(b.ctx, smolvm.VMConfig{}, smolvm.CreateOptions{})
		ids = append(ids, vm.ID)
		return err
	})
	if err != nil {
		return err
	}
	b.row("`Create`, median", ms(median(times)), "5 ms")
	times, err = repeat(quickRun, func() error { _, err := b.m.Get(b.ctx, ids[0]); return err })
	if err != nil {
		return err
	}
	b.row("`Get`, median", ms(median(times)), "0.3 ms")
	for _, id := range ids {
		if err := b.m.Delete(b.ctx, id, smolvm.DeleteOptions{}); err != nil {
			return err
		}
	}
	return nil
}

// cold measures a start from nothing against a bare QEMU, by turns.
func (b *bench) cold() error {
	var ours, bare []time.Duration
	for range coldRuns {
		began := time.Now()
		vm, err := b.start()
		if err != nil {
			return err
		}
		if err := b.exec(vm.ID); err != nil {
			return err
		}
		ours = append(ours, time.Since(began))
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", vm.PID))
		if err != nil {
			return err
		}
		if err := b.m.Delete(b.ctx, vm.ID, smolvm.DeleteOptions{}); err != nil {
			return err
		}
		took, err := b.bare(strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00"))
		if err != nil {
			return err
		}
		bare = append(bare, took)
	}
	b.row("bare QEMU, same command line: start → agent answers", ms(median(bare)), "")
	b.row("`Create` + `Start` → first exec done", ms(median(ours)), "")
	b.row("ratio of the two", ratio(median(ours), median(bare)), "1.15 ×")
	return nil
}

func (b *bench) start() (smolvm.VMInfo, error) {
	vm, err := b.m.Create(b.ctx, smolvm.VMConfig{Image: b.image}, smolvm.CreateOptions{})
	if err != nil {
		return vm, err
	}
	return b.m.Start(b.ctx, vm.ID, smolvm.StartOptions{Cold: true})
}

func (b *bench) exec(id string) error {
	status, err := b.m.Exec(b.ctx, id, smolvm.Command{Args: []string{"/bin/true"}})
	if err == nil && !status.Success() {
		err = fmt.Errorf("true: %s", status)
	}
	return err
}

// warm measures what a running VM costs.
func (b *bench) warm() error {
	vm, err := b.start()
	if err != nil {
		return err
	}
	if err := b.exec(vm.ID); err != nil {
		return err
	}
	select { // a shim gives memory back when it is idle
	case <-time.After(2 * time.Second):
	case <-b.ctx.Done():
		return b.ctx.Err()
	}
	pss, err := memoryOf(vm.ShimPID, "Pss:")
	if err != nil {
		return err
	}
	// The guest's own time for the same, measured by the guest's shell.
	loop := fmt.Sprintf("i=0; while [ $i -lt %d ]; do /bin/true; i=$((i+1)); done", guestLoop)
	var own, execs []time.Duration
	for range execTurns {
		began := time.Now()
		if _, err := b.m.Exec(b.ctx, vm.ID, smolvm.Command{Args: []string{"sh", "-c", loop}}); err != nil {
			return err
		}
		own = append(own, time.Since(began)/guestLoop)
		times, err := repeat(execTurn, func() error { return b.exec(vm.ID) })
		if err != nil {
			return err
		}
		execs = append(execs, times...)
	}
	b.row("fork + exec of `true` in the guest", ms(median(own)), "")
	b.row("exec of `true` over an open connection, median", ms(median(execs)), "")
	b.row("ratio of the two", ratio(median(execs), median(own)), "2.2 ×")
	b.row("memory of an idle shim (PSS)", megabytes(pss), "16 MB")
	began := time.Now()
	if err := b.m.Delete(b.ctx, vm.ID, smolvm.DeleteOptions{}); err != nil {
		return err
	}
	b.row("`Delete` of a running VM", ms(time.Since(began)), "")
	return nil
}

func megabytes(bytes int) string { return fmt.Sprintf("%.1f MB", float64(bytes)/1e6) }

// memoryOf sums up some of the sizes that the kernel tells of a process, in bytes; see
// proc_pid_smaps(5).
func memoryOf(pid int, names ...string) (sum int, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if !slices.Contains(names, fields[0]) {
			continue
		}
		size, err := strconv.Atoi(fields[1])
		if err != nil {
			return 0, err
		}
		sum += size << 10
	}
	return sum, nil
}

// command measures the CLI as a whole process.
func (b *bench) command() error {
	times, err := repeat(quickRun/4, func() error {
		return exec.CommandContext(b.ctx, b.program, "--data-dir", b.m.DataDir(), "ls").Run()
	})
	if err != nil {
		return err
	}
	b.row("`smolvm ls`, whole process, median", ms(median(times)), "25 ms")
	return nil
}

// list measures List with many VMs; they have no disks, to be made sooner.
func (b *bench) list() error {
	image, err := b.m.Image(b.ctx, smolvm.DefaultImage)
	if err != nil {
		return err
	}
	for range manyVMs {
		_, err := b.m.Create(b.ctx, smolvm.VMConfig{KernelPath: image.KernelPath, InitrdPath: image.InitrdPath}, smolvm.CreateOptions{})
		if err != nil {
			return err
		}
	}
	times, err := repeat(quickRun/4, func() error {
		vms, err := b.m.List(b.ctx, smolvm.ListOptions{})
		if err == nil && len(vms) != manyVMs {
			err = fmt.Errorf("listed %d VMs", len(vms))
		}
		return err
	})
	if err != nil {
		return err
	}
	b.row("`List` of 10,000 VMs, median", ms(median(times)), "60 ms")
	return nil
}
