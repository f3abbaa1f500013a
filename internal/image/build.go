package image

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/durable"
	"github.com/smolvm/smolvm/internal/glob"
	"github.com/smolvm/smolvm/internal/image/ext4fs"
	"github.com/smolvm/smolvm/internal/step"
)

// Files of an image.
const (
	kernelFile    = "vmlinux"
	initramfsFile = "initramfs"
	rootfsFile    = "rootfs"
	// smallFile holds what rootfsFile does, in a file system that is no larger than that
	// takes. It is not there if that would be much.
	smallFile = "rootfs-small"
)

// defaultBootArgs are the kernel arguments of an image:
//
//   - console, reboot and panic as everywhere in smolvm: a guest that panics resets,
//     which ends its VM;
//   - quiet, because each line on an emulated serial port costs about a millisecond;
//   - mitigations=off: they keep programs of a guest from spying on its kernel, and
//     that is no border in a VM that is made for one job. Hosts are protected by
//     their own;
//   - audit=0 and 8250.nr_uarts=1: nobody listens, and there is one port;
//   - random.trust_cpu=on: a guest gets a seed from its host as well;
//   - GODEBUG is for the agent, as part of its environment. Signals that preempt
//     goroutines cost an emulated CPU more than the agent's short ones are worth;
//   - lsm: of what Debian's kernel has, AppArmor and TOMOYO look at every program that
//     is started, and an image without their rules has no use for that.
const defaultBootArgs = "reboot=k panic=1 quiet root=/dev/vda rw mitigations=off audit=0 8250.nr_uarts=1 random.trust_cpu=on lsm=landlock,lockdown,yama GODEBUG=asyncpreemptoff=1"

// Build builds an image, unless one of the same recipe is there or is made by another
// process meanwhile. A build that fails or is killed leaves nothing that could be
// taken for an image.
func (s *Store) Build(ctx context.Context, recipe Recipe) (smolvm.Image, error) {
	if err := recipe.validate(); err != nil {
		return smolvm.Image{}, err
	}
	current := func() (smolvm.Image, bool) {
		if recipe.Force {
			return smolvm.Image{}, false
		}
		return s.current(recipe)
	}
	return s.buildOnce(ctx, current, func(work string) (string, error) {
		b := builder{recipe: recipe, work: work, out: filepath.Join(work, "image")}
		meta, err := b.build(ctx)
		if err != nil {
			return "", err
		}
		if err := s.publish(ctx, b, meta); err != nil {
			return "", fmt.Errorf("publish image: %w", err)
		}
		return meta.Digest, nil
	})
}

// buildOnce builds an image in a directory that is removed then, unless it is current when no other
// process builds. Build returns the digest of the image, which has appeared.
func (s *Store) buildOnce(ctx context.Context, current func() (smolvm.Image, bool), build func(work string) (digest string, err error)) (smolvm.Image, error) {
	unlock, err := s.lockBuilds(ctx)
	if err != nil {
		return smolvm.Image{}, err
	}
	defer unlock()
	if image, ok := current(); ok {
		return image, nil
	}
	if err := s.removeLeftovers(); err != nil {
		return smolvm.Image{}, err
	}
	work, err := os.MkdirTemp(s.dir, buildPrefix+"*")
	if err != nil {
		return smolvm.Image{}, err
	}
	defer func() { _ = os.RemoveAll(work) }()
	digest, err := build(work)
	if err != nil {
		if ctx.Err() != nil { // rather than how a program died of it
			err = fmt.Errorf("build was interrupted: %w", context.Cause(ctx))
		}
		return smolvm.Image{}, err
	}
	return s.describe(digest)
}

// publish makes a finished image appear, and its name point to it.
func (s *Store) publish(ctx context.Context, b builder, meta metadata) error {
	if err := s.appear(ctx, b.work, b.out, meta); err != nil {
		return err
	}
	record := nameRecord{Digest: meta.Digest, Recipe: b.key, Agent: b.agent, AgentHash: b.agentHash}
	if err := s.writeName(b.recipe.Name, record); err != nil {
		return err
	}
	step.Reached(ctx, "image build/named")
	return nil
}

// appear makes a finished image, whose files are in out, one of the store's.
func (s *Store) appear(ctx context.Context, work, out string, meta metadata) error {
	if err := writeJSON(filepath.Join(out, metadataFile), meta); err != nil {
		return err
	}
	for _, name := range append(imageFiles(), metadataFile, ".") {
		if err := durable.Sync(filepath.Join(out, name)); err != nil {
			return err
		}
	}
	// An image of the same content may be in use: it stays, unless it is damaged.
	if _, err := s.load(meta.Digest); err == nil {
		return nil
	}
	final := s.imageDir(meta.Digest)
	if err := os.Rename(final, filepath.Join(work, "damaged")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	step.Reached(ctx, "image build/cleared")
	if err := os.Rename(out, final); err != nil {
		return err
	}
	step.Reached(ctx, "image build/moved")
	return durable.Sync(s.dir)
}

// builder is one build.
type builder struct {
	recipe    Recipe
	work, out string
	// The fields of the image's nameRecord.
	agent          fileID
	agentHash, key string

	source []string
	hash   bytes.Buffer // what the digest is made of
}

func (b *builder) build(ctx context.Context) (metadata, error) {
	if err := os.Mkdir(b.out, 0o700); err != nil {
		return metadata{}, err
	}
	fmt.Fprintf(&b.hash, "recipe %d %s\n", recipeVersion, runtime.GOARCH)
	agent, err := b.identify()
	if err != nil {
		return metadata{}, err
	}
	ingredients, err := b.gather(ctx)
	if err != nil {
		return metadata{}, err
	}
	b.recipe.say("unpack kernel", 0, 0)
	if err := b.makeKernel(ingredients.kernel); err != nil {
		return metadata{}, err
	}
	b.recipe.say("make initramfs", 0, 0)
	if err := b.makeInitramfs(agent, ingredients.modules); err != nil {
		return metadata{}, err
	}
	b.recipe.say("make root file system", 0, 0)
	if err := b.makeRootfs(ctx, ingredients); err != nil {
		return metadata{}, fmt.Errorf("root file system: %w", err)
	}
	args := "console=" + consoleDevice() + " " + defaultBootArgs
	b.hash.WriteString(args)
	return metadata{
		Digest:    digestPrefix + hashOf(b.hash.Bytes()),
		BootArgs:  args,
		Arch:      runtime.GOARCH,
		Source:    strings.Join(b.source, ", "),
		CreatedAt: time.Now().UTC(),
	}, nil
}

// identify notes what the image is made of, before any of it is read: what changes
// from then on makes it out of date. It returns the agent.
func (b *builder) identify() ([]byte, error) {
	var err error
	if b.agent, err = identify(b.recipe.Agent); err != nil {
		return nil, fmt.Errorf("read agent: %w", err)
	}
	agent, err := os.ReadFile(b.recipe.Agent)
	if err != nil {
		return nil, fmt.Errorf("read agent: %w", err)
	}
	b.agentHash = hashOf(agent)
	if b.key, err = b.recipe.key(b.agentHash); err != nil {
		return nil, fmt.Errorf("read ingredients: %w", err)
	}
	return agent, nil
}

func consoleDevice() string {
	if runtime.GOARCH == "arm64" {
		return "ttyAMA0"
	}
	return "ttyS0"
}

// debArch returns the architecture as Debian names it, which for ours is as Go does.
func debArch() string { return runtime.GOARCH }

// ingredients are the files that an image is made from.
type ingredients struct {
	kernel, modules, rootfs string
	owners                  map[string]int // see makeExt4; nil: as they are
}

// gather finds the ingredients, fetching those that the recipe does not name.
func (b *builder) gather(ctx context.Context) (ingredients, error) {
	found := ingredients{kernel: b.recipe.Kernel, modules: b.recipe.ModulesDir, rootfs: b.recipe.Rootfs}
	for _, path := range []string{cmp.Or(b.recipe.KernelName, found.kernel), found.rootfs} {
		if path != "" {
			b.source = append(b.source, path)
		}
	}
	if found.kernel != "" && found.rootfs != "" {
		return found, nil
	}
	packages := filepath.Join(b.work, "packages")
	if err := os.Mkdir(packages, 0o755); err != nil {
		return found, err
	}
	manager, err := newHostPackages(packages)
	if err != nil {
		return found, err
	}
	files, err := b.fetch(ctx, manager)
	if err != nil && !manager.private && ctx.Err() == nil {
		// The host's lists are missing, or too old for what the mirror still has.
		b.recipe.say("update package lists", 0, 0)
		if err = manager.update(ctx); err == nil {
			files, err = b.fetch(ctx, manager)
		}
	}
	if err != nil {
		return found, err
	}
	return b.unpackAll(ctx, files, found)
}

// fetch downloads the packages of the ingredients that are missing.
func (b *builder) fetch(ctx context.Context, manager *hostPackages) ([]string, error) {
	var packages []string
	b.recipe.say("find packages", 0, 0)
	if b.recipe.Kernel == "" {
		kernel, err := manager.kernelPackages(ctx)
		if err != nil {
			return nil, err
		}
		packages = append(packages, kernel...)
	}
	if b.recipe.Rootfs == "" {
		packages = append(packages, "busybox-static")
	}
	phase := "download " + strings.Join(packages, ", ")
	b.recipe.say(phase, 0, 100)
	return manager.download(ctx, packages, func(percent float64) { b.recipe.say(phase, int64(percent), 100) })
}

func (b *builder) unpackAll(ctx context.Context, debs []string, found ingredients) (ingredients, error) {
	b.recipe.say("unpack packages", 0, 0)
	tree := filepath.Join(b.work, "unpacked")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return found, err
	}
	for _, deb := range debs {
		err := unpack(ctx, deb, tree, func(name string) bool {
			return strings.HasPrefix(name, "boot/vmlinuz-") || strings.Contains(name, "lib/modules/") || strings.HasSuffix(name, "bin/busybox")
		})
		if err != nil {
			return found, err
		}
		b.source = append(b.source, strings.TrimSuffix(filepath.Base(deb), ".deb"))
	}
	if found.kernel == "" {
		kernels, err := glob.In(tree, "boot/vmlinuz-*")
		if err != nil || len(kernels) != 1 {
			return found, fmt.Errorf("find kernel in its package: %d files look like one", len(kernels))
		}
		found.kernel = kernels[0]
		// Debian's newer packages have /usr/lib.
		for _, lib := range []string{"lib/modules", "usr/lib/modules"} {
			if _, err := os.Stat(filepath.Join(tree, lib)); err == nil {
				found.modules = filepath.Join(tree, lib)
			}
		}
	}
	if found.rootfs == "" {
		found.rootfs = filepath.Join(b.work, "rootfs")
		busybox := filepath.Join(tree, "bin/busybox")
		if _, err := os.Stat(busybox); err != nil {
			busybox = filepath.Join(tree, "usr/bin/busybox")
		}
		if err := makeBaseTree(ctx, found.rootfs, busybox); err != nil {
			return found, fmt.Errorf("lay out root file system: %w", err)
		}
		found.owners = map[string]int{"home/user": userID}
	}
	return found, nil
}

func (b *builder) makeKernel(path string) error {
	out, err := os.Create(filepath.Join(b.out, kernelFile))
	if err != nil {
		return err
	}
	err = writeKernel(out, path)
	if err := errors.Join(err, out.Close()); err != nil {
		return fmt.Errorf("kernel %s: %w", path, err)
	}
	return b.addHash(kernelFile)
}

// addHash adds a file of the image to what its digest is made of.
func (b *builder) addHash(name string) error {
	hash, err := hashFile(filepath.Join(b.out, name))
	if err != nil {
		return err
	}
	b.hash.WriteString(name + " " + hash + "\n")
	return nil
}

func (b *builder) makeInitramfs(agent []byte, modules string) error {
	set, err := findModules(modules)
	if err != nil {
		return err
	}
	out, err := os.Create(filepath.Join(b.out, initramfsFile))
	if err != nil {
		return err
	}
	err = writeInitramfs(out, agent, set)
	if err := errors.Join(err, out.Close()); err != nil {
		return err
	}
	return b.addHash(initramfsFile)
}

func (b *builder) makeRootfs(ctx context.Context, from ingredients) error {
	source, target := from.rootfs, filepath.Join(b.out, rootfsFile)
	stat, err := os.Stat(source)
	if err != nil {
		return err
	}
	if stat.IsDir() {
		sum, err := sumTree(source)
		if err != nil {
			return err
		}
		b.hash.WriteString(sum + "\n")
		size, files, err := measure(source)
		if err != nil {
			return err
		}
		made := ext4{path: target, size: max(rootfsSize, 2*size), files: files, tree: source, owners: from.owners, seed: sum}
		if err := makeExt4(ctx, made); err != nil {
			return err
		}
		if made.size = smallSize(size); made.size > maxSmallSize {
			return nil
		}
		made.path = filepath.Join(b.out, smallFile)
		err = makeExt4(ctx, made)
		if errors.Is(err, ext4fs.ErrNoSpace) { // the host's file system packs files better
			return os.Remove(made.path)
		}
		return err
	}
	if err := checkRootfs(source); err != nil {
		return err
	}
	if err := disk.Copy(ctx, disk.CopyOptions{Path: target, Base: source}); err != nil {
		return err
	}
	sum, err := disk.Sum(ctx, target)
	if err != nil {
		return err
	}
	b.hash.WriteString(rootfsFile + " " + sum + "\n")
	return nil
}

// sumTree returns a hash over a tree's content. Times make no difference.
func sumTree(dir string) (string, error) {
	var listing bytes.Buffer
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		inner, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		var content string
		switch info.Mode().Type() {
		case 0:
			content, err = hashFile(path)
		case fs.ModeSymlink:
			content, err = os.Readlink(path)
		default: // no content
		}
		if err != nil {
			return err
		}
		fmt.Fprintf(&listing, "%q %s %q", inner, info.Mode(), content)
		if stat, ok := info.Sys().(*syscall.Stat_t); ok && os.Getuid() == 0 {
			fmt.Fprintf(&listing, " %d %d %d", stat.Uid, stat.Gid, stat.Rdev)
		}
		listing.WriteByte('\n')
		return nil
	})
	return hashOf(listing.Bytes()), err
}
