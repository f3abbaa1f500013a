package manager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/embedded"
	"github.com/smolvm/smolvm/internal/image"
	"github.com/smolvm/smolvm/internal/image/distro"
	"github.com/smolvm/smolvm/internal/step"
)

// BuildImage builds an image, unless one of the same recipe is there. Of several
// processes that build the same image at once, one does the work.
func (m *Manager) BuildImage(ctx context.Context, opts smolvm.BuildOptions) (smolvm.Image, error) {
	began := time.Now()
	if len(opts.Packages) > 0 || opts.RecipeFile != "" || distro.IsBuiltIn(opts.Name) && opts.Rootfs == "" && opts.Kernel == "" {
		return m.buildPackaged(ctx, opts)
	}
	if opts.Name == "" {
		opts.Name = smolvm.DefaultImage
	}
	agentPath, err := m.agentPath()
	if err != nil {
		return smolvm.Image{}, fmt.Errorf("build image %q: %w", opts.Name, err)
	}
	if err := m.budget.Check(); err != nil {
		return smolvm.Image{}, fmt.Errorf("build image %q: %w", opts.Name, err)
	}
	kernelName := ""
	if opts.Kernel == "" && opts.ModulesDir == "" {
		used, _, err := m.kernels.Used()
		if err != nil {
			return smolvm.Image{}, fmt.Errorf("build image %q: %w", opts.Name, err)
		}
		opts.Kernel, kernelName = used.Path, used.Name
	}
	built, err := m.images.Build(ctx, image.Recipe{
		Name:       opts.Name,
		Agent:      agentPath,
		Kernel:     opts.Kernel,
		KernelName: kernelName,
		ModulesDir: opts.ModulesDir,
		Rootfs:     opts.Rootfs,
		Force:      opts.Force,
		Progress:   opts.Progress,
	})
	if err != nil {
		return smolvm.Image{}, fmt.Errorf("build image %q: %w", opts.Name, err)
	}
	m.note(ctx, "", "image-build", began, opts.Name+" "+built.Digest)
	return built, nil
}

// Images lists the images, the oldest first.
func (m *Manager) Images(ctx context.Context) ([]smolvm.Image, error) { return m.catalog.List(ctx) }

// Image finds an image by name, digest, or the beginning of its digest. The error
// matches [smolvm.ErrImageNotFound] if there is none here.
func (m *Manager) Image(ctx context.Context, ref string) (smolvm.Image, error) {
	return m.catalog.Find(ctx, ref)
}

// RemoveImage removes an image, and the templates of it. The error matches
// [smolvm.ErrImageInUse] if a VM, a snapshot or a pool, or a disk that was retained
// from a VM, is based on it.
func (m *Manager) RemoveImage(ctx context.Context, ref string) error {
	found, err := m.findImage(ctx, ref)
	if err != nil {
		return err
	}
	if done, err := m.catalog.Untag(ctx, ref, found); done || err != nil {
		return err
	}
	if found.Digest == "" { // it was never made bootable
		return m.catalog.Forget(ctx, found)
	}
	err = m.images.Remove(ctx, found.Digest, func() error {
		if err := m.imageInUse(ctx, found.Digest); err != nil {
			return fmt.Errorf("remove image %q: %w", ref, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	step.Reached(ctx, "image rm/removed")
	return errors.Join(m.catalog.Forget(ctx, found), m.dropTemplates(ctx))
}

// imageInUse returns an error that matches [smolvm.ErrImageInUse] if something is based on an
// image.
func (m *Manager) imageInUse(ctx context.Context, digest string) error {
	users, err := m.imageUsers(ctx)
	if err != nil {
		return err
	}
	if by := users[digest]; len(by) > 0 {
		return fmt.Errorf("%w by %s; delete them first", smolvm.ErrImageInUse, strings.Join(by, ", "))
	}
	return nil
}

// dropTemplates removes the templates of images that are gone, also those that a process left
// which was killed when it had removed the image.
func (m *Manager) dropTemplates(ctx context.Context) error {
	templates, err := m.Templates(ctx)
	if err != nil {
		return err
	}
	images, err := m.images.List(ctx) // later: a template's image was there before it
	if err != nil {
		return err
	}
	var errs []error
	for _, template := range templates {
		if !slices.ContainsFunc(images, func(i smolvm.Image) bool { return i.Digest == template.Image }) {
			errs = append(errs, m.RemoveTemplate(ctx, template.ID))
		}
	}
	return errors.Join(errs...)
}

// findImage finds an image even if it is damaged, by its digest then.
func (m *Manager) findImage(ctx context.Context, ref string) (smolvm.Image, error) {
	found, err := m.catalog.Find(ctx, ref)
	if err == nil || errors.Is(err, smolvm.ErrImageNotFound) {
		return found, err
	}
	images, listErr := m.images.List(ctx)
	if listErr != nil {
		return found, errors.Join(err, listErr)
	}
	i := slices.IndexFunc(images, func(i smolvm.Image) bool {
		return i.Digest == ref || strings.HasPrefix(i.Digest, "sha256:"+ref)
	})
	if i < 0 {
		return found, err
	}
	return images[i], nil
}

// PruneImages removes every image that no VM uses and that no name points to, and
// what killed builds have left. It returns the images removed.
func (m *Manager) PruneImages(ctx context.Context) ([]smolvm.Image, error) {
	users, err := m.imageUsers(ctx)
	if err != nil {
		return nil, fmt.Errorf("prune images: %w", err)
	}
	gone, err := m.images.Prune(ctx, func(i smolvm.Image) (bool, error) {
		named, err := m.catalog.HasName(i)
		if err != nil || named || len(users[i.Digest]) > 0 {
			return true, err
		}
		created, err := m.store.UsersOfImage(ctx, i.Digest) // since we looked
		return len(created) > 0, err
	})
	step.Reached(ctx, "image prune/removed")
	return gone, errors.Join(err, m.catalog.Prune(ctx), os.RemoveAll(m.dir.BuildCaches()), m.kernels.Prune(), m.dropTemplates(ctx))
}

// imageUsers says by digest what is based on an image, in words.
func (m *Manager) imageUsers(ctx context.Context) (map[string][]string, error) {
	vms, err := m.store.ListVMs(ctx, "")
	if err != nil {
		return nil, err
	}
	users := map[string][]string{}
	own := map[string]bool{}
	for _, vm := range vms {
		own[vm.DiskPath] = true
		if vm.Image != "" {
			users[vm.Image] = append(users[vm.Image], "VM "+vm.ID)
		}
	}
	snapshots, err := m.Snapshots(ctx)
	if err != nil {
		return nil, err
	}
	for _, snapshot := range snapshots {
		users[snapshot.Image] = append(users[snapshot.Image], "snapshot "+snapshot.Name)
	}
	pools, err := m.store.Pools().List(ctx)
	if err != nil {
		return nil, err
	}
	for _, pool := range pools {
		users[pool.Config.Image] = append(users[pool.Config.Image], "pool "+pool.ID)
	}
	images, err := m.images.List(ctx)
	if err != nil {
		return nil, err
	}
	retained, err := m.disks.List()
	if err != nil {
		return nil, err
	}
	for _, path := range retained {
		if own[path] {
			continue
		}
		root, err := m.disks.Root(path)
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(images, func(i smolvm.Image) bool { return root != "" && (i.RootfsPath == root || i.SmallRootfsPath == root) })
		if i >= 0 {
			users[images[i].Digest] = append(users[images[i].Digest], "retained disk "+filepath.Base(path))
		}
	}
	return users, nil
}

// ensureImage finds the image of a new VM. The default one is built if it is missing, or made
// for another agent than ours; so is one of packages that has a built-in name; an OCI image is pulled as the policy has it.
func (m *Manager) ensureImage(ctx context.Context, ref string, policy smolvm.PullPolicy, progress func(smolvm.Progress)) (smolvm.Image, error) {
	if distro.IsBuiltIn(ref) {
		// One that was made of files, and given that name, wins.
		if own, err := m.images.Get(ctx, ref); err == nil || !errors.Is(err, smolvm.ErrImageNotFound) {
			return own, err
		}
		return m.packaged.Ensure(ctx, ref, policy, progress)
	}
	if ref != smolvm.DefaultImage {
		return m.catalog.Ensure(ctx, ref, policy, progress)
	}
	return m.baseImage(ctx, progress)
}

// baseImage finds or builds the default image.
func (m *Manager) baseImage(ctx context.Context, progress func(smolvm.Progress)) (smolvm.Image, error) {
	const ref = smolvm.DefaultImage
	agentPath, err := m.agentPath()
	if err != nil {
		// A program without an agent may still use what another has built.
		if found, getErr := m.images.Get(ctx, ref); getErr == nil {
			return found, nil
		}
		return smolvm.Image{}, err
	}
	kernel, _, err := m.kernels.Used()
	if err != nil {
		return smolvm.Image{}, err
	}
	return m.images.Ensure(ctx, image.Recipe{
		Name: ref, Agent: agentPath, Kernel: kernel.Path, KernelName: kernel.Name, Progress: progress,
	})
}

// agentPath finds the agent program.
func (m *Manager) agentPath() (string, error) {
	if m.config.AgentPath != "" {
		return m.config.AgentPath, nil
	}
	path, err := embedded.Extract(m.dir.Cache())
	if !errors.Is(err, embedded.ErrNotBuiltIn) {
		return path, err
	}
	path, err = findProgram("smolvm-agent")
	if err != nil {
		return "", &smolvm.Error{Hint: "build it with `make build`, or name it with the AgentPath option", Err: err}
	}
	return path, nil
}
