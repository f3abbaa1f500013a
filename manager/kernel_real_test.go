package manager_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

// openWithKernel opens a Manager whose images boot with a kernel that `smolvm image kernel` has built;
// see make test-kernel, which takes a quarter of an hour of a processor the first time.
func openWithKernel(t *testing.T) *manager.Manager {
	t.Helper()
	kernel := testenv.KernelOfOurs()
	if kernel == "" {
		t.Skip("needs a kernel that is built: make test-kernel")
	}
	testenv.RequireQEMU(t)
	config := useReal(t)
	config.Templates = manager.TemplateConfig{}
	sharePackages(t, config.DataDir)
	m := openAt(t, config)
	// It is found again, by all that decides what it is.
	built, err := m.BuildKernel(t.Context(), smolvm.KernelOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := filepath.Base(filepath.Dir(built.Path)), filepath.Base(filepath.Dir(kernel)); got != want {
		t.Fatalf("%s, by %s, is kept as %s, want %s", built.Name, built.Compiler, got, want)
	}
	return m
}

// sharePackages has a data directory keep packages where all tests do, so that they are fetched once.
func sharePackages(t *testing.T, dataDir string) {
	t.Helper()
	packages, shared := filepath.Join(dataDir, "cache", "packages"), filepath.Join(testenv.Cache(t), "packages")
	err := errors.Join(os.MkdirAll(shared, 0o700), os.MkdirAll(filepath.Dir(packages), 0o700), os.Symlink(shared, packages))
	if err != nil {
		t.Fatal(err)
	}
}

// A kernel that is built here boots, and has what images, Docker and smolvm itself rely on; in clones,
// forks and restored VMs too.
func TestKernelOfOurs(t *testing.T) {
	m := openWithKernel(t)
	shared := t.TempDir()
	if err := os.WriteFile(filepath.Join(shared, "file"), []byte("of the host"), 0o600); err != nil {
		t.Fatal(err)
	}
	config := smolvm.VMConfig{Mounts: []smolvm.Mount{{Source: shared, Target: "/project"}}}
	vm := mustRun(t, m, config)
	for name, test := range map[string]struct{ line, want string }{
		"version":     {"uname -r | grep -c smolvm", "1"},
		"mount":       {"cat /project/file; echo of the guest >/project/new", "of the host"},
		"controllers": {"cat /sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory hugetlb pids"},
		"limits":      {"cd /sys/fs/cgroup; echo '+memory +pids' >cgroup.subtree_control; mkdir g && echo 64M >g/memory.max && cat g/memory.max; rmdir g", "67108864"},
		"namespaces":  {"unshare -m -u -i -n -p -f sh -c 'hostname other; hostname; ls /sys/class/net | wc -l >/dev/null; echo $$'", "other\n1"},
		"users":       {"unshare -U -r id -u", "0"},
		"overlay":     {"mkdir -p /tmp/o && mount -t tmpfs t /tmp/o && cd /tmp/o && mkdir l u w m && echo low >l/f && mount -t overlay o -o lowerdir=l,upperdir=u,workdir=w m && cat m/f && umount m", "low"},
		"loop":        {"dd if=/dev/zero of=/tmp/i bs=1M count=4 2>/dev/null && losetup -f /tmp/i && losetup -a | grep -c /tmp/i && losetup -d /dev/loop0", "1"},
		"queues":      {"mkdir -p /tmp/q && mount -t mqueue q /tmp/q && cat /proc/sys/fs/mqueue/queues_max", "256"},
		"tun":         {"ls /dev/net/tun", "/dev/net/tun"},
		"seccomp":     {"grep -c Seccomp_filters /proc/self/status", "1"},
		"generation":  {"ls /sys/bus/acpi/drivers/vmgenid >/dev/null && ls -d /sys/bus/platform/drivers/virtio-mmio /sys/bus/pci/drivers/virtio-pci | wc -l", "2"},
		"random":      {"cat /sys/class/misc/hw_random/rng_current", "virtio_rng.0"},
		"landlock":    {"dmesg | grep -c 'landlock: Up'", "1"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := sh(t, m, vm.ID, test.line); got != test.want {
				t.Errorf("%s: %q, want %q", test.line, got, test.want)
			}
		})
	}
	if got, err := os.ReadFile(filepath.Join(shared, "new")); err != nil || string(got) != "of the guest\n" {
		t.Errorf("the host has %q of the guest, %v", got, err)
	}
	t.Run("clone", func(t *testing.T) {
		if _, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{}); err != nil {
			t.Fatal(err)
		}
		created := mustCreate(t, m, smolvm.VMConfig{})
		clone, err := m.Start(t.Context(), created.ID, smolvm.StartOptions{})
		if err != nil || clone.Start.Method != smolvm.StartClone {
			t.Fatalf("it is started by %+v, %v", clone.Start, err)
		}
		if sh(t, m, clone.ID, "cat /proc/sys/kernel/random/boot_id") == sh(t, m, vm.ID, "cat /proc/sys/kernel/random/boot_id") {
			t.Error("it has another's identity")
		}
	})
	t.Run("snapshot and fork", func(t *testing.T) {
		sh(t, m, vm.ID, "echo kept >/dev/shm/kept")
		if _, err := m.CreateSnapshot(t.Context(), vm.ID, smolvm.SnapshotOptions{Name: "taken"}); err != nil {
			t.Fatal(err)
		}
		restored, err := m.RestoreSnapshot(t.Context(), "taken", smolvm.RestoreOptions{ID: "restored"})
		if err != nil {
			t.Fatal(err)
		}
		children, err := m.Fork(t.Context(), vm.ID, smolvm.ForkOptions{Count: 1, IDs: []string{"child"}})
		if err != nil || len(children.Children) != 1 {
			t.Fatal(children, err)
		}
		for _, id := range []string{vm.ID, restored.ID, "child"} {
			if got := sh(t, m, id, "cat /dev/shm/kept /project/file"); got != "kept\nof the host" {
				t.Errorf("%s has %q", id, got)
			}
		}
		if err := m.RemoveSnapshot(t.Context(), "taken"); err != nil {
			t.Error(err)
		}
	})
	t.Run("stop", func(t *testing.T) {
		if _, err := m.Stop(t.Context(), vm.ID, smolvm.StopOptions{}); err != nil {
			t.Error(err)
		}
	})
}

// An image of the distribution's packages boots with it too, and sets up the network as Docker does,
// by nftables and both kinds of iptables.
func TestKernelOfOursForDocker(t *testing.T) {
	m := openWithKernel(t)
	if _, err := m.BuildImage(t.Context(), smolvm.BuildOptions{Name: "nat", Packages: []string{"iptables", "nftables", "iproute2"}}); err != nil {
		t.Fatal(err)
	}
	vm := mustRun(t, m, smolvm.VMConfig{Image: "nat"})
	sh(t, m, vm.ID, "ip link add docker0 type bridge && ip addr add 172.17.0.1/16 dev docker0 && ip link set docker0 up")
	const links = "ip link add v0 type veth peer name v1 && ip link set v0 master docker0 && ip link add mv0 link v1 type macvlan && ip link add x0 type vxlan id 7 dstport 4789 && ls /sys/class/net/docker0/brif"
	if got := sh(t, m, vm.ID, links); got != "v0" {
		t.Errorf("the bridge has %q", got)
	}
	rules := []string{
		"-t nat -N DOCKER", "-t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
		"-t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
		"-t nat -A DOCKER ! -i docker0 -p tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80",
		"-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-A FORWARD -i docker0 -m comment --comment x -j ACCEPT",
		"-A FORWARD -m mark --mark 1 -m limit --limit 1/s -m multiport -p tcp --dports 1,2 -j REJECT",
		"-t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu", "-t raw -A PREROUTING -i docker0 -j CT --notrack",
	}
	for _, program := range []string{"iptables-nft", "iptables-legacy"} {
		for _, rule := range rules {
			sh(t, m, vm.ID, program+" "+rule)
		}
		if got := sh(t, m, vm.ID, program+" -t nat -S POSTROUTING"); !strings.Contains(got, "MASQUERADE") {
			t.Errorf("%s has %q", program, got)
		}
	}
	sh(t, m, vm.ID, "ip6tables-nft -t nat -A POSTROUTING -j MASQUERADE && ip6tables-legacy -A INPUT -j REJECT")
	sh(t, m, vm.ID, "nft 'add table inet t; add chain inet t c { type filter hook forward priority 0; }; add rule inet t c ct state established counter limit rate 1/second log accept; add set inet t s { type ipv4_addr; }'")
	if got := sh(t, m, vm.ID, "uname -r; cat /proc/sys/net/bridge/bridge-nf-call-iptables"); !strings.Contains(got, "smolvm\n1") {
		t.Errorf("the guest says %q", got)
	}
}
