package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/manager"
)

// bootPatience bounds a boot of backends: on KVM that is itself emulated it takes half a minute.
const bootPatience = 5 * time.Minute

// contender is a backend that is measured.
type contender struct {
	bench
	name         string
	colds, saved []time.Duration
	phases       phases
	memory       int // of the VMM beside the guest's, in bytes
	requests     int // to the VMM's API, until the guest runs; 0: it has none, or logs none
}

// phases are the times of the parts of starts, by their names, in the order in which they come.
type phases struct {
	names []string
	times map[string][]time.Duration
}

// add adds what a start reports.
func (p *phases) add(kind string, vm smolvm.VMInfo) {
	if vm.Start == nil {
		return
	}
	if p.times == nil {
		p.times = map[string][]time.Duration{}
	}
	for _, phase := range vm.Start.Timeline {
		name := kind + phase.Name
		if _, ok := p.times[name]; !ok {
			p.names = append(p.names, name)
		}
		p.times[name] = append(p.times[name], phase.Duration)
	}
}

// backends compares the backends that can run VMs on this host, by turns, and prints a table.
// The ratios are to the last backend, which is the one that runs everywhere.
func backends(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("bench backends", flag.ContinueOnError)
	runs := flags.Int("runs", 10, "how many starts of each kind to measure")
	images := flags.String("images", "", "take the images of this data directory, instead of making the default one")
	only := flags.String("only", "", "compare only these backends, as in firecracker,qemu")
	if err := flags.Parse(args); err != nil {
		return err
	}
	all, closeAll, err := contenders(ctx, *images, *only)
	defer closeAll()
	if err != nil {
		return err
	}
	for _, c := range all {
		fmt.Fprintf(os.Stderr, "%s: make a template\n", c.name)
		if _, err := c.m.BuildTemplate(ctx, smolvm.TemplateOptions{}); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	for n := range *runs {
		for _, c := range all {
			fmt.Fprintf(os.Stderr, "%s: round %d of %d\n", c.name, n+1, *runs)
			if err := c.round(); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
		}
	}
	printBackends(os.Stdout, all)
	return nil
}

// contenders opens a Manager for each backend that is to be measured.
func contenders(ctx context.Context, images, only string) (all []*contender, closeAll func(), err error) {
	var closers []func()
	closeAll = func() {
		for _, c := range closers {
			c()
		}
	}
	probe, err := os.MkdirTemp("", "smolvm-bench-")
	if err != nil {
		return nil, closeAll, err
	}
	closers = append(closers, func() { _ = os.RemoveAll(probe) })
	m, err := manager.Open(ctx, manager.Config{DataDir: filepath.Join(probe, "data"), Embedded: true, AgentPath: agentPath()})
	if err != nil {
		return nil, closeAll, err
	}
	known, err := m.Backends(ctx)
	if err = errors.Join(err, m.Close()); err != nil {
		return nil, closeAll, err
	}
	for _, backend := range known {
		if only != "" && !slices.Contains(strings.Split(only, ","), backend.Name) {
			continue
		}
		if !backend.Available {
			fmt.Fprintf(os.Stderr, "%s is left out: %s\n", backend.Name, backend.Why)
			continue
		}
		m, dir, closeOne, err := open(ctx, manager.Config{Backend: backend.Name, Embedded: true, AgentPath: agentPath()}, images)
		if err != nil {
			return nil, closeAll, err
		}
		closers = append(closers, closeOne)
		all = append(all, &contender{bench: bench{ctx: ctx, m: m, dir: dir}, name: backend.Name})
	}
	if len(all) == 0 {
		return nil, closeAll, errors.New("no backend that is to be compared can run VMs on this host")
	}
	return all, closeAll, nil
}

// agentPath is the agent that was built beside the smolvm program, unless the environment has
// another.
func agentPath() string { return cmp.Or(os.Getenv("SMOLVM_AGENT"), "bin/smolvm-agent") }

// round measures one start of each kind.
func (c *contender) round() error {
	booted, err := c.begin(smolvm.StartOptions{Cold: true, Timeout: bootPatience}, smolvm.StartBoot)
	if err != nil {
		return err
	}
	c.colds = append(c.colds, booted.took)
	c.phases.add("cold: ", booted.vm)
	// What the VMM needs for itself is seen best where no page of the guest's is shared.
	if c.memory, err = overhead(booted.vm.PID, booted.vm.Config.MemoryMiB); err != nil {
		return err
	}
	if c.requests, err = requestsUntilStart(booted.vm); err != nil {
		return err
	}
	if _, err := c.remove(booted.vm); err != nil {
		return err
	}
	clone, err := c.begin(smolvm.StartOptions{Timeout: bootPatience}, smolvm.StartClone)
	if err != nil {
		return err
	}
	c.saved = append(c.saved, clone.took)
	c.phases.add("clone: ", clone.vm)
	_, err = c.remove(clone.vm)
	return err
}

// requestsUntilStart counts the requests in a Firecracker's log, to the one by which the guest
// was started, which is the only action until then.
func requestsUntilStart(vm smolvm.VMInfo) (int, error) {
	text, err := os.ReadFile(filepath.Join(filepath.Dir(vm.LogPath), machine.VMMLog))
	if err != nil {
		return 0, err
	}
	requests := 0
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "The API server received a ") {
			requests++
		}
		if strings.Contains(line, `"/actions"`) {
			return requests, nil
		}
	}
	return 0, nil
}

// overhead returns the memory of a VMM without the guest's, in bytes: the proportional share of
// all that it has mapped but the one mapping that is as large as the guest's memory.
func overhead(pid, guestMiB int) (sum int, err error) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return 0, err
	}
	defer func() { _ = file.Close() }()
	isGuests := false
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "Size:" && fields[0] != "Pss:" {
			continue
		}
		kib, err := strconv.Atoi(fields[1])
		if err != nil {
			return 0, err
		}
		switch {
		case fields[0] == "Size:":
			isGuests = kib >= guestMiB<<10
		case !isGuests:
			sum += kib << 10
		}
	}
	return sum, lines.Err()
}

func printBackends(w io.Writer, all []*contender) {
	base := all[len(all)-1]
	row := func(what string, value func(c *contender) string) {
		cells := []string{what}
		for _, c := range all {
			cells = append(cells, value(c))
		}
		_, _ = fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | "))
	}
	times := func(of func(c *contender) []time.Duration) func(c *contender) string {
		return func(c *contender) string {
			text := both(of(c))
			if c != base {
				text += ", " + ratio(median(of(c)), median(of(base)))
			}
			return text
		}
	}
	row("What", func(c *contender) string { return c.name })
	row("---", func(*contender) string { return "---" })
	row("cold start → first command done", times(func(c *contender) []time.Duration { return c.colds }))
	row("clone → first command done", times(func(c *contender) []time.Duration { return c.saved }))
	for _, name := range base.phases.names {
		row(name, func(c *contender) string {
			if len(c.phases.times[name]) == 0 {
				return ""
			}
			return ms(median(c.phases.times[name]))
		})
	}
	row("memory of the VMM beside the guest's", func(c *contender) string { return megabytes(c.memory) })
	row("requests to the VMM's API until the guest runs", func(c *contender) string {
		if c.requests == 0 {
			return ""
		}
		return strconv.Itoa(c.requests)
	})
}
