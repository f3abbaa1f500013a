package qemu

import (
	"slices"
	"strings"
	"testing"

	"github.com/smolvm/smolvm/internal/vmm"
)

func testConfig(edit func(*vmm.Config)) vmm.Config {
	cfg := vmm.Config{
		ID:          "web",
		Accelerator: vmm.TCG,
		VCPUs:       2,
		MemoryMiB:   512,
		Kernel:      "/images/vmlinux",
		BootArgs:    "console=ttyS0 panic=1",
		ConsolePath: "/vms/web/console.log",
		LogPath:     "/vms/web/vmm.log",
	}
	if edit != nil {
		edit(&cfg)
	}
	return cfg
}

func TestMachineFor(t *testing.T) {
	for _, test := range []struct{ accelerator, arch, want string }{
		{vmm.TCG, "amd64", machineQ35},
		{vmm.KVM, "amd64", machineMicroVM},
		{vmm.KVM, "arm64", machineVirt},
		{vmm.TCG, "arm64", machineVirt},
	} {
		cfg := vmm.Config{Accelerator: test.accelerator, Channel: true}
		if got := machineFor(cfg, test.arch); got != test.want {
			t.Errorf("machineFor(%s, %s) = %s, want %s", test.accelerator, test.arch, got, test.want)
		}
	}
	if got := machineFor(vmm.Config{Accelerator: vmm.KVM}, "amd64"); got != machineQ35 {
		t.Errorf("a kernel that is not ours gets %s, want %s", got, machineQ35)
	}
}

// Each case names words that must follow each other in the command line, and words
// that must not be in it.
func TestArgs(t *testing.T) {
	tests := map[string]struct {
		machine string
		edit    func(*vmm.Config)
		want    []string
		not     []string
	}{
		"sandbox and nothing by default": {
			machine: machineQ35,
			want: []string{
				"-no-user-config -nodefaults -no-reboot",
				"-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
				"-machine q35,sata=off,smbus=off,vmport=off", "-accel tcg,thread=multi", "-cpu max,erms=off,fsrm=off,svm=off,vmx=off", "-smp 2", "-m 512M",
				"-chardev socket,id=qmp,fd=3",
			},
			not: []string{"-initrd", "-netdev", "virtio-serial-pci", "-drive"},
		},
		"drives in order": {
			machine: machineQ35,
			edit: func(c *vmm.Config) {
				c.Drives = []vmm.Drive{
					{Path: "/disks/a,b.qcow2", Format: "qcow2"},
					{Path: "/dev/data", Format: "raw", ReadOnly: true, Device: true},
				}
			},
			want: []string{
				`-add-fd fd=10,set=10,opaque=/disks/a,,b.qcow2 -blockdev {"node-name":"drive0","driver":"qcow2","read-only":false,"discard":"unmap","file":{"driver":"file","read-only":false,"discard":"unmap","filename":"/dev/fdset/10"},"backing":null} -device virtio-blk-pci,id=disk0,drive=drive0,write-cache=on`,
				`-add-fd fd=20,set=20,opaque=/dev/data -blockdev {"node-name":"drive1","driver":"raw","read-only":true,"discard":"unmap","file":{"driver":"host_device","read-only":true,"discard":"unmap","filename":"/dev/fdset/20"}} -device virtio-blk-pci,id=disk1,drive=drive1,write-cache=on`,
			},
			not: []string{"-drive"},
		},
		"a chain is what is named, and read only": {
			machine: machineQ35,
			edit: func(c *vmm.Config) {
				c.Drives = []vmm.Drive{{Path: "/a", Format: "qcow2", Backing: []vmm.DiskFile{{Path: "/b", Format: "qcow2"}, {Path: "/c", Format: "raw"}}}}
			},
			want: []string{"-add-fd fd=10,set=10,opaque=/a -add-fd fd=11,set=11,opaque=/b -add-fd fd=12,set=12,opaque=/c -blockdev", `"filename":"/dev/fdset/10"},"backing":{"driver":"qcow2","read-only":true,"file":{"driver":"file","read-only":true,"discard":"unmap","filename":"/dev/fdset/11"},` +
				`"backing":{"driver":"raw","read-only":true,"file":{"driver":"file","read-only":true,"discard":"unmap","filename":"/dev/fdset/12"}}}}`},
		},
		"channel and NIC": {
			machine: machineQ35,
			edit: func(c *vmm.Config) {
				c.Channel = true
				c.NIC = &vmm.NIC{MAC: "02:00:00:00:00:02", MTU: 4000}
			},
			want: []string{
				"-netdev socket,id=net,fd=5 -device virtio-net-pci,netdev=net,guest_announce=off,mac=02:00:00:00:00:02,host_mtu=4000,romfile=",
				"-device virtio-serial-pci,max_ports=2,vectors=7 -chardev socket,id=channel,fd=4 -device virtserialport,chardev=channel,name=smolvm.agent",
			},
		},
		"TAP": {
			machine: machineQ35,
			edit:    func(c *vmm.Config) { c.NIC = &vmm.NIC{MAC: "02:00:00:00:00:02", TAP: "tap0"} },
			want:    []string{"-netdev tap,id=net,fd=5,vhost=off -device virtio-net-pci,netdev=net"},
			not:     []string{"socket,id=net", "script", "ifname"},
		},
		"microvm has no PCI": {
			machine: machineMicroVM,
			edit: func(c *vmm.Config) {
				c.Accelerator = vmm.KVM
				c.BootArgs += " pci=off"
				c.NIC = &vmm.NIC{MAC: "02:00:00:00:00:02"}
			},
			want: []string{
				"-machine microvm,acpi=on,rtc=on,isa-serial=on,pit=off,pic=off", "-cpu host,svm=off,vmx=off",
				"-append console=ttyS0 panic=1 pci=off", "virtio-net-device,netdev=net,guest_announce=off,mac=02:00:00:00:00:02",
			},
			not: []string{"romfile"},
		},
		"restored": {
			machine: machineQ35,
			edit: func(c *vmm.Config) {
				c.Restore = &vmm.Restore{Memory: "/templates/a,b/memory", State: "/templates/a,b/state"}
			},
			want: []string{
				"-object memory-backend-file,id=ram,size=512M,share=off,mem-path=/templates/a,,b/memory -incoming fd:6",
			},
			not: []string{"memory-backend-ram"},
		},
		"q35 needs PCI": {
			machine: machineQ35,
			edit:    func(c *vmm.Config) { c.BootArgs = "console=ttyS0 pci=off root=/dev/vda" },
			want:    []string{"-append console=ttyS0 root=/dev/vda norandmaps no_timer_check"},
			not:     []string{"pci=off"},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got := strings.Join(args(testConfig(test.edit), test.machine, testFDs(testConfig(test.edit))), " ")
			for _, want := range test.want {
				if !strings.Contains(got, want) {
					t.Errorf("command line lacks %q:\n%s", want, got)
				}
			}
			for _, not := range test.not {
				if strings.Contains(got, not) {
					t.Errorf("command line has %q:\n%s", not, got)
				}
			}
		})
	}
}

// testFDs are numbers of inherited files; those of disks are 10, 11 and so on for the files of
// the first, 20 and so on for the second.
func testFDs(cfg vmm.Config) fds {
	fd := fds{qmp: 3, console: 8, channel: 4, link: 5, state: 6}
	for i, drive := range cfg.Drives {
		numbers := []int{10 * (i + 1)}
		for n := range drive.Backing {
			numbers = append(numbers, 10*(i+1)+n+1)
		}
		fd.disks = append(fd.disks, numbers)
	}
	return fd
}

func TestArgsSameTwice(t *testing.T) {
	cfg := testConfig(func(c *vmm.Config) { c.Channel = true })
	if a, b := args(cfg, machineQ35, testFDs(cfg)), args(cfg, machineQ35, testFDs(cfg)); !slices.Equal(a, b) {
		t.Errorf("two command lines of one configuration differ:\n%s\n%s", a, b)
	}
}
