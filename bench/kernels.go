package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/proc"
)

// booting is the default image with one of the kernels that are compared.
type booting struct {
	bench
	// times are those of what is measured, by its name.
	times map[string][]time.Duration
	// Sizes in bytes: of the kernel, of the template, and what the last idle clone has for itself.
	kernel, template int64
	private          int
}

// What is measured of each kernel, in the order of the table, and the goals by ratio.
const (
	coldTook, coldCPU   = "cold start → first exec done", "QEMU's CPU time of a cold start"
	cloneTook, cloneCPU = "clone → first exec done", "QEMU's CPU time of a clone"
	warmExec, guestFork = "exec of `true` over an open connection", "fork + exec of `true` in the guest"
)

// kernels compares a kernel with the distribution's, by turns, and prints a table.
func kernels(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("bench kernels", flag.ContinueOnError)
	kernel := flags.String("kernel", "", "compare the kernel in this file, as of smolvm image kernel")
	runs := flags.Int("runs", 10, "how many starts of each kind to measure")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *kernel == "" {
		return errors.New("no kernel to compare: give it by -kernel")
	}
	opened, closeAll, err := openBench(ctx, "")
	if err != nil {
		return err
	}
	defer closeAll()
	if _, err := opened.m.BuildImage(ctx, smolvm.BuildOptions{Name: "small", Kernel: *kernel}); err != nil {
		return err
	}
	var both []*booting
	for _, image := range []string{smolvm.DefaultImage, "small"} {
		b := &booting{bench: opened, times: map[string][]time.Duration{}}
		b.image = image
		if err := b.prepare(); err != nil {
			return fmt.Errorf("%s: %w", image, err)
		}
		both = append(both, b)
	}
	for n := range *runs {
		status("round %d of %d", n+1, *runs)
		for _, b := range both {
			if err := b.round(); err != nil {
				return fmt.Errorf("%s: %w", b.image, err)
			}
		}
	}
	for _, b := range both {
		if err := b.idle(); err != nil {
			return fmt.Errorf("%s: %w", b.image, err)
		}
	}
	status("")
	printKernels(os.Stdout, both[0], both[1])
	return nil
}

// prepare makes the template of VMs of the image.
func (b *booting) prepare() error {
	image, err := b.m.Image(b.ctx, b.image)
	if err != nil {
		return err
	}
	info, err := os.Stat(image.KernelPath)
	if err != nil {
		return err
	}
	b.kernel = info.Size()
	status("%s: make a template", b.image)
	template, err := b.m.BuildTemplate(b.ctx, smolvm.TemplateOptions{Image: b.image})
	b.template = template.Size
	return err
}

// round measures a VM that boots, and works, and one that is a clone.
func (b *booting) round() error {
	booted, err := b.begin(smolvm.StartOptions{Cold: true}, smolvm.StartBoot)
	if err != nil {
		return err
	}
	if err := b.add(coldTook, coldCPU, booted); err != nil {
		return err
	}
	loop := fmt.Sprintf("i=0; while [ $i -lt %d ]; do /bin/true; i=$((i+1)); done", guestLoop)
	began := time.Now()
	if _, err := b.m.Exec(b.ctx, booted.vm.ID, smolvm.Command{Args: []string{"sh", "-c", loop}}); err != nil {
		return err
	}
	b.times[guestFork] = append(b.times[guestFork], time.Since(began)/guestLoop)
	execs, err := repeat(execTurn, func() error { return b.exec(booted.vm.ID) })
	if err != nil {
		return err
	}
	b.times[warmExec] = append(b.times[warmExec], execs...)
	if _, err := b.remove(booted.vm); err != nil {
		return err
	}
	clone, err := b.begin(smolvm.StartOptions{}, smolvm.StartClone)
	if err != nil {
		return err
	}
	if err := b.add(cloneTook, cloneCPU, clone); err != nil {
		return err
	}
	_, err = b.remove(clone.vm)
	return err
}

// add adds what a start took, and the processor time of its VMM by now.
func (b *booting) add(took, cpu string, s starting) error {
	used, err := proc.CPUTime(s.vm.PID)
	if err != nil {
		return err
	}
	b.times[took] = append(b.times[took], s.took)
	b.times[cpu] = append(b.times[cpu], used)
	return nil
}

// idle measures the memory that an idle clone has for itself while another one runs.
func (b *booting) idle() error {
	var clones []smolvm.VMInfo
	for range 2 {
		clone, err := b.begin(smolvm.StartOptions{}, smolvm.StartClone)
		if err != nil {
			return err
		}
		clones = append(clones, clone.vm)
	}
	if err := b.wait(idleTime); err != nil {
		return err
	}
	private, err := memoryOf(clones[0].PID, "Private_Clean:", "Private_Dirty:")
	b.private = private
	for _, vm := range clones {
		_, failed := b.remove(vm)
		err = errors.Join(err, failed)
	}
	return err
}

func printKernels(w io.Writer, base, small *booting) {
	goals := map[string]string{coldTook: "0.55 ×", warmExec: "0.8 ×"}
	_, _ = fmt.Fprintln(w, "| What, medians | the distribution's kernel | ours | ours / the distribution's | Goal |\n|---|---|---|---|---|")
	for _, what := range []string{coldTook, coldCPU, cloneTook, cloneCPU, warmExec, guestFork} {
		a, b := median(base.times[what]), median(small.times[what])
		_, _ = fmt.Fprintf(w, "| %s | %s | %s | %s | %s |\n", what, ms(a), ms(b), ratio(b, a), goals[what])
	}
	for _, size := range []struct {
		what string
		a, b int64
	}{
		{"kernel", base.kernel, small.kernel}, {"template", base.template, small.template},
		{"private memory of an idle clone", int64(base.private), int64(small.private)},
	} {
		_, _ = fmt.Fprintf(w, "| %s | %s | %s | %.3g × | |\n", size.what, megabytes(int(size.a)), megabytes(int(size.b)), float64(size.b)/float64(max(size.a, 1)))
	}
}
