package manager_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

// An image with systemd boots to the end beside the agent, is healthy then, and is shut down by its own
// init: services are stopped in their way, and the file system is clean. Also when it is stopped before
// it has booted.
func TestSystemd(t *testing.T) {
	if !testenv.Dev() {
		t.Skip("builds an image of packages: make test-dev")
	}
	config := useReal(t)
	config.Templates = manager.TemplateConfig{}
	sharePackages(t, config.DataDir)
	m := openAt(t, config)
	ctx := t.Context()
	if _, err := m.BuildImage(ctx, smolvm.BuildOptions{Name: "systemd-of-test", Packages: []string{"systemd-sysv", "dbus"}}); err != nil {
		t.Fatal(err)
	}
	vm := mustCreate(t, m, smolvm.VMConfig{Image: "systemd-of-test", Init: "/sbin/init", Healthcheck: &smolvm.Healthcheck{
		Command: []string{"systemctl", "is-active", "multi-user.target"}, Interval: time.Second, StartPeriod: 3 * time.Minute,
	}})
	t.Cleanup(func() {
		ctx := context.WithoutCancel(ctx)
		if err := errors.Join(m.Delete(ctx, vm.ID, smolvm.DeleteOptions{}), m.RemoveImage(ctx, "systemd-of-test")); err != nil {
			t.Error(err)
		}
	})
	start := func() {
		t.Helper()
		if _, err := m.Start(ctx, vm.ID, smolvm.StartOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	stop := func() {
		t.Helper()
		if _, err := m.Stop(ctx, vm.ID, smolvm.StopOptions{Timeout: 2 * time.Minute}); err != nil {
			t.Fatal(err)
		}
	}
	start()
	if _, err := m.WaitHealthy(ctx, vm.ID); err != nil {
		t.Fatal(err)
	}
	const unit = `cat >/etc/systemd/system/last.service <<'END'
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=/bin/sh -c 'echo stopped >/root/last'
END
systemctl start last.service
readlink /proc/1/exe; systemd-detect-virt; systemctl --failed --no-legend`
	if got, want := sh(t, m, vm.ID, unit), "/usr/lib/systemd/systemd\nqemu"; got != want {
		t.Errorf("the guest says %q, want %q", got, want)
	}
	stop()
	start()
	if got := sh(t, m, vm.ID, "cat /root/last; dmesg"); !strings.HasPrefix(got, "stopped\n") {
		t.Errorf("its service was not stopped: %.200q", got)
	} else if strings.Contains(got, "recovery complete") {
		t.Error("its file system was not unmounted")
	}
	stop() // while it boots
	start()
	if got := sh(t, m, vm.ID, "dmesg"); strings.Contains(got, "recovery complete") {
		t.Error("its file system was not unmounted when it was stopped early")
	}
	stop()
}
