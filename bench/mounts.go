package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
)

// mountBench compares what programs do in a directory of the host that is mounted in a guest with
// doing it in a copy, by turns.
type mountBench struct {
	bench
	vm    string
	times map[string][]time.Duration
}

// mounts measures directories of the host in guests, and prints a table.
func mounts(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("bench mounts", flag.ContinueOnError)
	runs := flags.Int("runs", 3, "how often to measure")
	files := flags.Int("files", 10_000, "how many files the repository of git has")
	megabytes := flags.Int("megabytes", 500, "how large the tree for tar is, in MiB")
	images := flags.String("images", "", "take the images of this data directory, instead of making the default one")
	if err := flags.Parse(args); err != nil {
		return err
	}
	common, closeAll, err := openBench(ctx, *images)
	if err != nil {
		return err
	}
	defer closeAll()
	b := &mountBench{bench: common, times: map[string][]time.Duration{}}
	shared := filepath.Join(b.dir, "shared")
	if err := makeTrees(ctx, shared, *files, *megabytes); err != nil {
		return err
	}
	created, err := b.m.Create(ctx, smolvm.VMConfig{
		DiskSizeMiB: max(8<<10, int64(*megabytes)*4), MemoryMiB: 1024,
		Mounts: []smolvm.Mount{{Source: shared, Target: "/mounted"}},
	}, smolvm.CreateOptions{})
	if err == nil {
		b.vm = created.ID
		_, err = b.m.Start(ctx, b.vm, smolvm.StartOptions{})
	}
	if err == nil {
		err = b.bringGit()
	}
	for n := 0; n < *runs && err == nil; n++ {
		fmt.Fprintf(os.Stderr, "round %d of %d\n", n+1, *runs)
		err = b.round(shared)
	}
	if err != nil {
		return err
	}
	b.print(*files, *megabytes)
	return nil
}

// makeTrees makes a repository with many files, and a tree with large ones.
func makeTrees(ctx context.Context, dir string, files, megabytes int) error {
	const perDir, size = 100, 2 << 10
	for i := range files {
		name := filepath.Join(dir, "git", fmt.Sprintf("d%03d", i/perDir), fmt.Sprintf("f%03d", i%perDir))
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, random(size), 0o644)); err != nil {
			return err
		}
	}
	const large = 10
	for i := range max(1, megabytes/large) {
		name := filepath.Join(dir, "tar", fmt.Sprintf("f%03d", i))
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, random(large<<20), 0o644)); err != nil {
			return err
		}
	}
	line := "cd " + dir + "/git && git init -q && git add . && git -c user.name=x -c user.email=x@example.org commit -qm x"
	if out, err := exec.CommandContext(ctx, "sh", "-c", line).CombinedOutput(); err != nil {
		return fmt.Errorf("make a repository: %w: %s", err, out)
	}
	return nil
}

func random(size int) []byte {
	b := make([]byte, size)
	_, _ = rand.Read(b) // never fails: crypto/rand ends the program instead
	return b
}

// bringGit copies this host's git into the guest, with the libraries that it needs.
func (b *mountBench) bringGit() error {
	git, err := exec.LookPath("git")
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(b.ctx, "ldd", git).Output()
	if err != nil {
		return fmt.Errorf("libraries of git: %w", err)
	}
	paths := []string{git}
	for word := range strings.FieldsSeq(string(out)) {
		if filepath.IsAbs(word) {
			paths = append(paths, word)
		}
	}
	for _, path := range paths {
		file, err := filepath.EvalSymlinks(path)
		if err == nil {
			err = b.do("mkdir -p " + filepath.Dir(path))
		}
		if err == nil {
			err = b.m.CopyTo(b.ctx, b.vm, file, path)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// do runs a line of shell in the guest.
func (b *mountBench) do(line string) error {
	var words strings.Builder
	status, err := b.m.Exec(b.ctx, b.vm, smolvm.Command{Args: []string{"sh", "-c", line}, Stdout: io.Discard, Stderr: &words})
	if err == nil && !status.Success() {
		err = fmt.Errorf("%s: %s: %s", line, status, words.String())
	}
	return err
}

// drop has the guest forget what it has read.
const drop = "sync; echo 3 >/proc/sys/vm/drop_caches; "

// round measures everything once.
func (b *mountBench) round(shared string) error {
	status := func(at string) string {
		return "cd " + at + "/git && GIT_OPTIONAL_LOCKS=0 git -c safe.directory='*' status --porcelain"
	}
	tar := func(at string) string { return "tar -cf /dev/null -C " + at + " tar" }
	if err := b.do("rm -rf /copied && mkdir /copied"); err != nil {
		return err
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"copy git", func() error { return b.m.CopyTo(b.ctx, b.vm, shared+"/git", "/copied/git") }},
		{"copy tar", func() error { return b.m.CopyTo(b.ctx, b.vm, shared+"/tar", "/copied/tar") }},
		{"", func() error { return b.do(drop + "cd /copied/git && git update-index -q --refresh") }},
		{"status of the copy", func() error { return b.do(status("/copied")) }},
		{"", func() error { return b.do(drop) }},
		{"tar of the copy", func() error { return b.do(tar("/copied")) }},
		{"", func() error { return b.do(drop) }},
		{"first status", func() error { return b.do(status("/mounted")) }},
		{"second status", func() error { return b.do(status("/mounted")) }},
		{"", func() error { return b.do(drop) }},
		{"first tar", func() error { return b.do(tar("/mounted")) }},
	} {
		began := time.Now()
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", cmp.Or(step.name, "prepare"), err)
		}
		if step.name != "" {
			b.times[step.name] = append(b.times[step.name], time.Since(began))
		}
	}
	return nil
}

// print prints medians, and ratios to copying the tree in and doing the same there.
func (b *mountBench) print(files, megabytes int) {
	of := func(names ...string) (sum time.Duration) {
		for _, name := range names {
			times := slices.Clone(b.times[name])
			slices.Sort(times)
			sum += times[len(times)/2]
		}
		return sum
	}
	fmt.Println("| What | Mounted | Copied in, and done there | Ratio |\n|---|---|---|---|")
	for _, row := range []struct {
		what, mounted string
		copied        []string
	}{
		{fmt.Sprintf("`git status` of %d files", files), "first status", []string{"copy git", "status of the copy"}},
		{"the same again, without the copying", "second status", []string{"status of the copy"}},
		{fmt.Sprintf("`tar` of %d MiB", megabytes), "first tar", []string{"copy tar", "tar of the copy"}},
		{"without the copying", "first tar", []string{"tar of the copy"}},
	} {
		mounted, copied := of(row.mounted), of(row.copied...)
		fmt.Printf("| %s | %s | %s | %s |\n", row.what, ms(mounted), ms(copied), ratio(mounted, copied))
	}
}
