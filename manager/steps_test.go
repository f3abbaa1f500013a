package manager_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/glob"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/manager"
)

// verb is an operation that is cut short at each of its steps.
type verb struct {
	work, id string // what a child does; see childWork
	// templates has starts use and make templates; with fresh its VM has no file yet.
	templates, fresh bool
	// disks says that it has to do with disks: it is cut short with both kinds of them.
	disks bool
	// before makes what the operation works on.
	before func(t *testing.T, m *manager.Manager)
	// after makes sure that what the operation was to do can be done still, or anew.
	after func(t *testing.T, m *manager.Manager)
	// starts are the VMs that it starts.
	starts []string
	// safe are the VMs that are there afterwards whatever happens, with their file.
	safe []string
}

// kept is what the file of each VM and snapshot says that was there before.
const kept = "kept"

func stepsVM(t *testing.T, m *manager.Manager) {
	t.Helper()
	mustRun(t, m, smolvm.VMConfig{ID: "vm"})
	sh(t, m, "vm", "echo "+kept+" > /root/file; sync")
}

func stepsSnapshot(t *testing.T, m *manager.Manager) {
	t.Helper()
	stepsVM(t, m)
	if _, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "saved"}); err != nil {
		t.Fatal(err)
	}
}

func stepsPool(t *testing.T, m *manager.Manager) {
	t.Helper()
	if _, err := m.SetPool(t.Context(), smolvm.PoolOptions{Size: 1}); err != nil {
		t.Fatal(err)
	}
}

func stepsStopped(t *testing.T, m *manager.Manager) {
	t.Helper()
	stepsVM(t, m)
	if _, err := m.Stop(t.Context(), "vm", smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
}

// grown is the size to which a disk is made, in MiB, and webPort a port of a guest.
const (
	grown   = 64
	webPort = 8000
)

// stepsImage builds an image, and a template of it.
func stepsImage(t *testing.T, m *manager.Manager) {
	t.Helper()
	ownFiles(t, m)
	buildOwn(t, m)
	if _, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{Image: "mine"}); err != nil {
		t.Fatal(err)
	}
}

// forwardsAnew ends all forwards of the VM, and makes sure that a new one reaches the guest.
func forwardsAnew(t *testing.T, m *manager.Manager) {
	t.Helper()
	forwards, err := m.PortForwards(t.Context(), "vm")
	for _, forward := range forwards {
		err = errors.Join(err, m.RemovePortForward(t.Context(), "vm", forward))
	}
	if err != nil {
		t.Errorf("the forwards %+v can't be ended: %v", forwards, err)
		return
	}
	again, err := m.AddPortForward(t.Context(), "vm", smolvm.PortForward{HostAddr: ownAddr(t), GuestPort: webPort})
	if err != nil {
		t.Fatal(err)
	}
	sh(t, m, "vm", "mkdir -p /www; echo page > /www/index.html; httpd -p 8000 -h /www")
	if got := get(t, dialTCP(t, again)); !strings.Contains(got, "page") {
		t.Errorf("by a new forward comes %q", got)
	}
}

// policyAnew gives the VM another policy, which has to be in force then, whatever was written
// down of one before.
func policyAnew(t *testing.T, m *manager.Manager) {
	t.Helper()
	before, err := m.Egress(t.Context(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	after, err := m.SetEgress(t.Context(), "vm", smolvm.EgressPolicy{Default: smolvm.EgressDNSOnly})
	if err != nil || after.Revision != before.Revision+1 {
		t.Fatalf("set anew: %+v, %v", after, err)
	}
	vm, err := m.Get(t.Context(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	status, err := shim.NewClient(filepath.Dir(vm.SocketPath)).Status(t.Context())
	if err != nil || status.EgressRevision != after.Revision {
		t.Errorf("in force is revision %d, %v; want %d", status.EgressRevision, err, after.Revision)
	}
}

// imagesAnew builds the image anew, starts a VM of it, and removes all that is not needed.
func imagesAnew(t *testing.T, m *manager.Manager) {
	t.Helper()
	ctx := t.Context()
	buildOwn(t, m)
	vm := mustRun(t, m, smolvm.VMConfig{Image: "mine"})
	sh(t, m, vm.ID, "true")
	if err := m.Delete(ctx, vm.ID, smolvm.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	awaitTemplates(t, m)
	if err := m.RemoveImage(ctx, "mine"); err != nil {
		t.Error(err)
	}
	if _, err := m.PruneImages(ctx); err != nil {
		t.Error(err)
	}
	if images, err := m.Images(ctx); err != nil || len(images) != 1 {
		t.Errorf("images are %+v, %v", images, err)
	}
	left, err := glob.In(filepath.Join(m.DataDir(), "images"), ".build-*")
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
	if templates, err := m.Templates(ctx); err != nil || len(templates) != 0 {
		t.Errorf("templates of images that are gone: %+v, %v", templates, err)
	}
}

// committedAnew makes an image of the VM anew, starts a VM of it, and removes all of it.
func committedAnew(t *testing.T, m *manager.Manager) {
	t.Helper()
	ctx := t.Context()
	if _, err := m.CommitImage(ctx, "vm", "app", smolvm.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	vm := mustRun(t, m, smolvm.VMConfig{Image: "app"})
	sh(t, m, vm.ID, "true")
	if err := m.Delete(ctx, vm.ID, smolvm.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	awaitTemplates(t, m)
	if err := m.RemoveImage(ctx, "app"); err != nil {
		t.Error(err)
	}
	if _, err := m.PruneImages(ctx); err != nil {
		t.Error(err)
	}
	left, err := filepath.Glob(filepath.Join(m.DataDir(), "oci", "*", "*", "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}

// verbs are the operations that change something.
var verbs = map[string]verb{
	"create": {work: "create", id: "vm"},
	"start, first": {disks: true, work: "start", id: "vm", starts: []string{"vm"}, fresh: true, safe: []string{"vm"}, before: func(t *testing.T, m *manager.Manager) {
		mustCreate(t, m, smolvm.VMConfig{ID: "vm"})
	}},
	"start": {work: "start", id: "vm", starts: []string{"vm"}, safe: []string{"vm"}, before: stepsStopped},
	"stop":  {work: "stop", id: "vm", safe: []string{"vm"}, before: stepsVM},
	"rm":    {work: "rm", id: "vm", before: stepsVM},
	"pause": {work: "pause", id: "vm", safe: []string{"vm"}, before: stepsVM},
	"resume": {work: "resume", id: "vm", safe: []string{"vm"}, before: func(t *testing.T, m *manager.Manager) {
		stepsVM(t, m)
		if _, err := m.Pause(t.Context(), "vm"); err != nil {
			t.Fatal(err)
		}
	}},
	"snapshot": {disks: true, work: "snapshot", id: "vm", safe: []string{"vm"}, before: stepsVM},
	"restore":  {disks: true, work: "restore", id: "saved", starts: []string{"restored"}, safe: []string{"vm"}, before: stepsSnapshot},
	"restore in place": {disks: true, work: "restore in place", id: "saved", starts: []string{"vm"}, safe: []string{"vm"}, before: func(t *testing.T, m *manager.Manager) {
		stepsSnapshot(t, m)
		if _, err := m.Stop(t.Context(), "vm", smolvm.StopOptions{}); err != nil {
			t.Fatal(err)
		}
	}},
	"resize": {disks: true, work: "resize", id: "vm", safe: []string{"vm"}, before: stepsStopped, after: func(t *testing.T, m *manager.Manager) {
		t.Helper()
		if vm, err := m.Resize(t.Context(), "vm", smolvm.ResizeOptions{DiskSizeMiB: grown}); err != nil || vm.Config.DiskSizeMiB != grown {
			t.Errorf("resized it has %d MiB, %v", vm.Config.DiskSizeMiB, err)
		}
	}},
	"port add": {work: "add port", id: "vm", safe: []string{"vm"}, before: stepsVM, after: forwardsAnew},
	"port rm": {work: "remove port", id: "vm", safe: []string{"vm"}, after: forwardsAnew, before: func(t *testing.T, m *manager.Manager) {
		t.Helper()
		stepsVM(t, m)
		if _, err := m.AddPortForward(t.Context(), "vm", smolvm.PortForward{HostAddr: ownAddr(t), GuestPort: webPort}); err != nil {
			t.Fatal(err)
		}
	}},
	"policy set":            {work: "set policy", id: "vm", safe: []string{"vm"}, before: stepsVM, after: policyAnew},
	"image build":           {work: "build image", id: "mine", before: func(t *testing.T, m *manager.Manager) { ownFiles(t, m) }, after: imagesAnew},
	"image commit":          {work: "commit image", id: "vm", safe: []string{"vm"}, before: stepsVM, after: committedAnew},
	"image commit, stopped": {work: "commit image", id: "vm", starts: []string{"vm"}, safe: []string{"vm"}, before: stepsStopped, after: committedAnew},
	"image rm":              {work: "remove image", id: "mine", templates: true, before: stepsImage, after: imagesAnew},
	"image prune": {disks: true, work: "prune images", templates: true, before: func(t *testing.T, m *manager.Manager) {
		t.Helper()
		stepsImage(t, m) // which is without a name when another one has that
		ownFiles(t, m)
		buildOwn(t, m)
	}, after: imagesAnew},
	"snapshot rm": {work: "remove snapshot", id: "saved", safe: []string{"vm"}, before: stepsSnapshot},
	"template prune": {work: "prune templates", templates: true, before: func(t *testing.T, m *manager.Manager) {
		t.Helper()
		if _, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{}); err != nil {
			t.Fatal(err)
		}
	}},
	"fork":           {disks: true, work: "fork", id: "vm", starts: []string{"forked"}, safe: []string{"vm"}, before: stepsVM},
	"template build": {disks: true, work: "template", templates: true},
	"pool fill":      {disks: true, work: "pool", templates: true},
	"pool claim": {disks: true, work: "start", id: "vm", starts: []string{"vm"}, templates: true, safe: []string{"vm"}, before: func(t *testing.T, m *manager.Manager) {
		stepsPool(t, m)
		mustCreate(t, m, smolvm.VMConfig{ID: "vm"})
	}},
	"pool rm": {work: "empty pool", templates: true, before: stepsPool},
}

const shortSteps = 4

// Whichever process is killed at whichever step of whichever operation, another one finds all
// that was there before, can go on with what it finds, and leaves nothing behind when all is
// removed. The steps are those that the operation comes to if nobody is killed. In short mode,
// which is that of the race detector, it is at every shortSteps-th: what that detects is the same
// at most of them, and they take longer than all other tests.
func TestKilledAtEachStep(t *testing.T) {
	t.Parallel()
	var steps, killed, leaked atomic.Int32
	t.Run("of", func(t *testing.T) { // ends when all that run beside each other have
		for name, v := range verbs {
			for disks, k := range fakeKinds {
				if k.isRaw() && !v.disks {
					continue
				}
				t.Run(name+" with "+disks, func(t *testing.T) {
					t.Parallel()
					names := v.run(t, useFakeKind(t, k), "")
					if len(names) == 0 {
						t.Errorf("%s comes to no step", name)
					}
					for n, point := range names {
						if testing.Short() && n%shortSteps != 0 {
							continue
						}
						steps.Add(1)
						t.Run("at "+point, func(t *testing.T) {
							t.Parallel()
							t.Cleanup(func() { // the last one: after it was looked for what is left
								if t.Failed() {
									leaked.Add(1)
								}
							})
							if slices.Contains(v.run(t, useFakeKind(t, k), point), point) {
								killed.Add(1)
							} else { // what goes on in the background may come to it too late
								t.Log("it was not come to a second time")
							}
						})
					}
				})
			}
		}
	})
	t.Logf("steps=%d killed=%d leaked=%d", steps.Load(), killed.Load(), leaked.Load())
	if killed.Load() < steps.Load()*9/10 {
		t.Errorf("of %d steps only %d were come to a second time", steps.Load(), killed.Load())
	}
}

// The same with QEMU and real guests, at a few steps at which they have a part: the launcher
// of a VM that is ready is killed, who has a VM saved that goes on from an overlay now, and who
// takes a VM out of a pool.
func TestKilledAtSomeSteps(t *testing.T) {
	t.Parallel()
	for name, point := range map[string]string{
		"restore": "start/ready", "snapshot": "save/layer", "pool claim": "claim/moved",
	} {
		t.Run(name+" at "+point, func(t *testing.T) {
			t.Parallel()
			if !slices.Contains(verbs[name].run(t, useReal(t), point), point) {
				t.Errorf("it was not come to")
			}
		})
	}
}

// run does the operation in a process of its own, which is killed at a step, if that has a
// name, and checks what is left. It returns the steps that were come to.
func (v verb) run(t *testing.T, config manager.Config, point string) []string {
	t.Helper()
	if v.templates {
		config.Templates = manager.TemplateConfig{}
	}
	m := openAt(t, config)
	if v.before != nil {
		v.before(t, m)
	}
	trace := filepath.Join(t.TempDir(), "steps")
	c := startChild(t, m, v.id, v.work, step.TraceEnv+"="+trace, step.CrashEnv+"="+point)
	c.await(t, "begun")
	done := c.lines.Scan() // or it has ended, in this way or that
	if point == "" && !done {
		t.Fatal("the operation failed")
	}
	c.kill(t)
	again, err := manager.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = again.Close() }()
	if point != "" {
		v.check(t, again, point)
	}
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	if point == "" { // what follows comes to further steps
		v.check(t, again, point)
	}
	names := strings.FieldsFunc(string(text), func(r rune) bool { return r == '\n' })
	slices.Sort(names)
	return slices.Compact(names)
}

// check reconciles, and looks whether all is there that is to be there, and can be used.
func (v verb) check(t *testing.T, m *manager.Manager, point string) {
	t.Helper()
	ctx := t.Context()
	for _, id := range []string{"vm", "restored", "forked"} {
		vm, err := m.Get(ctx, id)
		for point == "start/written" && err == nil && vm.State.Alive() && slices.Contains(v.starts, id) {
			time.Sleep(10 * time.Millisecond) // the shim undoes what was written down already
			vm, err = m.Get(ctx, id)
		}
		if err == nil && !vm.State.Alive() {
			awaitSettled(t, m, id)
		}
	}
	awaitTemplates(t, m)
	if _, err := m.Reconcile(ctx); err != nil {
		t.Errorf("Reconcile: %v", err)
	}
	if v.after != nil {
		v.after(t, m)
	}
	vms, err := m.List(ctx, smolvm.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range v.safe {
		if !slices.ContainsFunc(vms, func(vm smolvm.VMInfo) bool { return vm.ID == id }) {
			t.Errorf("VM %s is lost", id)
		}
	}
	had := v.before != nil && !v.templates && !v.fresh
	for _, vm := range vms {
		if v.work != "rm" { // the rest of it is only there to be removed
			usable(t, m, vm, had)
		}
	}
	snapshots, err := m.Snapshots(ctx)
	if err != nil || v.work == "restore" && len(snapshots) != 1 {
		t.Errorf("snapshots are %+v, %v", snapshots, err)
	}
	for _, one := range snapshots {
		restored, err := m.RestoreSnapshot(ctx, one.Name, smolvm.RestoreOptions{})
		if err != nil {
			t.Errorf("snapshot %s: %v", one.Name, err)
		} else if got := sh(t, m, restored.ID, "cat /root/file"); got != kept {
			t.Errorf("in snapshot %s the file says %q", one.Name, got)
		}
		if err := m.RemoveSnapshot(ctx, one.Name); err != nil {
			t.Error(err)
		}
	}
	if v.templates {
		checkPools(t, m)
	}
}

// usable starts a VM, unless it runs, and runs a command in it.
func usable(t *testing.T, m *manager.Manager, vm smolvm.VMInfo, had bool) {
	t.Helper()
	var err error
	switch {
	case vm.State == smolvm.StatePaused:
		_, err = m.Resume(t.Context(), vm.ID)
	case !vm.State.Alive():
		_, err = m.Start(t.Context(), vm.ID, smolvm.StartOptions{})
	}
	if err != nil {
		t.Errorf("VM %s, which was %s (%s): %v", vm.ID, vm.State, vm.Cause, err)
		return
	}
	if got := sh(t, m, vm.ID, "cat /root/file 2>/dev/null || echo none"); had && got != kept {
		t.Errorf("the file of VM %s, which was %s, says %q", vm.ID, vm.State, got)
	}
}

// checkPools fills the pool anew, and starts a VM from it.
func checkPools(t *testing.T, m *manager.Manager) {
	t.Helper()
	pool, err := m.SetPool(t.Context(), smolvm.PoolOptions{Size: 2})
	if err != nil || pool.Ready != 2 {
		t.Errorf("pool is %+v, %v", pool, err)
	}
	if vm := mustRun(t, m, smolvm.VMConfig{}); vm.Start.Method != smolvm.StartPool {
		t.Errorf("a VM is started by %s, %q", vm.Start.Method, vm.Start.Warnings)
	}
	pools, err := m.Pools(t.Context())
	for _, one := range pools {
		err = errors.Join(err, m.RemovePool(t.Context(), one.ID))
	}
	if err != nil {
		t.Error(err)
	}
}
