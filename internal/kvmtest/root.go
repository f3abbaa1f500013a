package kvmtest

import (
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/image"
	"github.com/smolvm/smolvm/internal/vmm/traits"
)

const (
	// imageName is the name of the outer machine's image.
	imageName = "kvm-bed"
	// rootVersion changes whenever the same files of the host make another root file system.
	rootVersion = 1
	// userName is the ordinary user of the outer machine, and kvmGroup that of /dev/kvm.
	userName, kvmGroup = "user", "kvm"
	kvmGID             = 104
)

// rootFiles returns the files that the outer machine has in its root file system beside those
// of the default image: the path there, and that of the host's file.
func rootFiles(ctx context.Context, tools string) (map[string]string, error) {
	files := map[string]string{}
	programs := map[string]string{}
	for name, needed := range map[string]bool{
		traits.QEMUProgram(runtime.GOARCH): true, "debugfs": true, "mke2fs": true,
		"qemu-img": false, "ssh": false, "firecracker": false, "jailer": false,
	} {
		path, err := find(name, tools)
		switch {
		case err == nil:
			programs[name] = path
		case needed:
			return nil, fmt.Errorf("tests on KVM need %s on this host: %w", name, err)
		}
	}
	for _, path := range programs {
		files["/usr/bin/"+filepath.Base(path)] = path
	}
	// Parts of QEMU's that it loads at run time; Debian has them beside the libraries.
	accelerators, err := filepath.Glob("/usr/lib*/*/qemu/accel-*.so")
	if err != nil {
		return nil, err
	}
	for _, path := range accelerators {
		files[path] = path
	}
	for _, path := range append(slices.Collect(maps.Values(programs)), accelerators...) {
		libraries, err := librariesOf(ctx, path)
		if err != nil {
			return nil, err
		}
		for _, library := range libraries {
			files[library] = library
		}
	}
	for _, dir := range []string{"/usr/share/qemu", "/usr/share/seabios", "/usr/share/qemu-kvm"} {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && !entry.IsDir() {
				files[path] = path
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return files, nil
}

// find finds a program: in PATH, where Debian has system programs, or among the tools that
// scripts/install-deps.sh has put into the checkout.
func find(name, tools string) (string, error) {
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin", "/sbin", tools} {
		if err == nil {
			break
		}
		if found, elsewhere := exec.LookPath(filepath.Join(dir, name)); elsewhere == nil {
			path, err = found, nil
		}
	}
	return path, err
}

// librariesOf lists the shared libraries of a program, and its loader.
func librariesOf(ctx context.Context, path string) ([]string, error) {
	file, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("libraries of %s: %w", path, err)
	}
	needed, err := file.ImportedLibraries()
	if err := errors.Join(err, file.Close()); err != nil {
		return nil, fmt.Errorf("libraries of %s: %w", path, err)
	}
	if len(needed) == 0 {
		return nil, nil // linked statically
	}
	out, err := exec.CommandContext(ctx, "ldd", path).Output()
	if err != nil {
		return nil, fmt.Errorf("libraries of %s: ldd: %w", path, err)
	}
	// Lines are "name => /path (address)", or "/path/of/loader (address)".
	var libraries []string
	for line := range strings.Lines(string(out)) {
		for field := range strings.FieldsSeq(line) {
			if filepath.IsAbs(field) {
				libraries = append(libraries, field)
			}
		}
		if strings.Contains(line, "not found") {
			return nil, fmt.Errorf("libraries of %s: %s", path, strings.TrimSpace(line))
		}
	}
	return libraries, nil
}

// keyOf returns what names a root file system made of these files of the host: it changes
// with them.
func keyOf(files map[string]string) (string, error) {
	var text strings.Builder
	fmt.Fprintf(&text, "%d %s\n", rootVersion, runtime.GOARCH)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		stat, err := os.Stat(files[name])
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&text, "%q %q %d %d\n", name, files[name], stat.Size(), stat.ModTime().UnixNano())
	}
	sum := sha256.Sum256([]byte(text.String()))
	return hex.EncodeToString(sum[:8]), nil
}

// ensureImage makes the image of the outer machine in a store below dir, unless it is there.
// Others must not do the same at the same time.
func ensureImage(ctx context.Context, dir, tools, agent string, progress func(string)) (smolvm.Image, error) {
	files, err := rootFiles(ctx, tools)
	if err != nil {
		return smolvm.Image{}, err
	}
	key, err := keyOf(files)
	if err != nil {
		return smolvm.Image{}, err
	}
	store, err := image.Open(filepath.Join(dir, "images"))
	if err != nil {
		return smolvm.Image{}, err
	}
	say := func(p smolvm.Progress) { progress(p.Phase) }
	root := filepath.Join(dir, "root-"+key)
	if _, err := os.Stat(root); errors.Is(err, fs.ErrNotExist) {
		if err := layOut(ctx, dir, root, files, say); err != nil {
			return smolvm.Image{}, fmt.Errorf("lay out the outer machine: %w", err)
		}
	}
	recipe := image.Recipe{
		Name: imageName, Agent: agent, Progress: say,
		Kernel: filepath.Join(root, "kernel"), ModulesDir: filepath.Join(root, "tree/lib/modules"), Rootfs: filepath.Join(root, "tree"),
	}
	made, err := store.Ensure(ctx, recipe)
	if err != nil {
		return smolvm.Image{}, err
	}
	_, err = store.Prune(ctx, func(old smolvm.Image) (bool, error) { return old.Digest == made.Digest, nil })
	return made, err
}

// layOut makes root, with the kernel and the tree of the root file system in it, in the place
// of all that were made before.
func layOut(ctx context.Context, dir, root string, files map[string]string, say func(smolvm.Progress)) error {
	old, err := filepath.Glob(filepath.Join(dir, "root-*"))
	if err != nil {
		return err
	}
	for _, path := range old {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	work := root + ".new"
	gathered := filepath.Join(work, "gathered")
	if err := os.MkdirAll(gathered, 0o755); err != nil {
		return err
	}
	from, err := image.Gather(ctx, gathered, say)
	if err != nil {
		return err
	}
	tree := filepath.Join(work, "tree")
	err = errors.Join(
		os.Rename(from.Rootfs, tree),
		os.Rename(from.Kernel, filepath.Join(work, "kernel")),
		os.Rename(from.ModulesDir, filepath.Join(tree, "lib/modules")),
	)
	if err != nil {
		return err
	}
	say(smolvm.Progress{Phase: "lay out programs"})
	for name, source := range files {
		if err := place(ctx, source, filepath.Join(tree, name)); err != nil {
			return err
		}
	}
	if err := finish(ctx, tree); err != nil {
		return err
	}
	if err := os.RemoveAll(gathered); err != nil {
		return err
	}
	return os.Rename(work, root)
}

// place copies a file, by the content that is behind its name. It takes the place of what is
// there: busybox has lesser programs of some names.
func place(ctx context.Context, source, target string) error {
	stat, err := os.Stat(source)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := disk.Copy(ctx, disk.CopyOptions{Path: target, Base: source}); err != nil {
		return err
	}
	return os.Chmod(target, stat.Mode().Perm())
}

// finish adds what follows from the files of a tree, and the group of /dev/kvm.
func finish(ctx context.Context, tree string) error {
	releases, err := filepath.Glob(filepath.Join(tree, "lib/modules/*"))
	if err != nil || len(releases) != 1 {
		return fmt.Errorf("find modules: %d kernels have some", len(releases))
	}
	// The kernel asks modprobe for modules as they are needed, by this list.
	depmod := exec.CommandContext(ctx, filepath.Join(tree, "bin/busybox"), "depmod", "-b", tree, filepath.Base(releases[0]))
	if out, err := depmod.CombinedOutput(); err != nil {
		return fmt.Errorf("list modules: busybox depmod: %w: %s", err, out)
	}
	group, err := os.OpenFile(filepath.Join(tree, "etc/group"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(group, "%s:x:%d:%s\n", kvmGroup, kvmGID, userName)
	return errors.Join(err, group.Close())
}
