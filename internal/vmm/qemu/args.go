package qemu

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/smolvm/smolvm/internal/vmm"
)

// Machines. How they were chosen (QEMU 7.2, Debian's cloud kernel 6.1):
//
// Under emulation both boot in the same time, but microvm has neither HPET nor
// ACPI timer: its guest's clock ticks in steps of 4 ms, and at the wrong rate
// unless the kernel is told the host's TSC frequency. On q35 the kernel finds that
// out by itself. Under hardware virtualization the clock comes from kvm-clock, and
// microvm saves the firmware and the PCI scan, most of the boot's time there. A
// kernel that is not ours gets q35 in either case: it may know PCI only.
const (
	machineMicroVM = "microvm"
	machineQ35     = "q35"
	machineVirt    = "virt" // arm64's only one
)

// fds are the numbers that inherited files have in the VMM's process.
type fds struct {
	qmp, console, channel, link, state int
	// disks are those of each drive's files, as of [openDisks].
	disks [][]int
}

// consoleSet is the number of the console's set of inherited files, by which QEMU's options
// name them; see -add-fd in qemu(1). The set of a disk's file has the file's own number.
const consoleSet = 1

// machineFor chooses the machine for a VM.
func machineFor(cfg vmm.Config, arch string) string {
	switch {
	case arch == "arm64":
		return machineVirt
	case cfg.Accelerator == vmm.KVM && cfg.Channel:
		return machineMicroVM
	default:
		return machineQ35
	}
}

// busOf is the suffix that a machine's virtio devices have: "pci", or "device" for virtio-mmio.
func busOf(machine string) string {
	if machine == machineMicroVM {
		return "device"
	}
	return "pci"
}

// args is QEMU's command line for a VM. It is a function of its arguments alone.
func args(cfg vmm.Config, machine string, fd fds) []string {
	b := builder{bus: busOf(machine)}
	b.add("-name", "smolvm-"+cfg.ID)
	b.add("-no-user-config")
	b.add("-nodefaults")
	b.add("-no-reboot")
	b.add("-display", "none")
	// The guest is not trusted: should it take QEMU over, it may not start
	// programs, gain privileges, or change resource limits.
	b.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	b.add("-machine", machineArg(machine, cfg.Accelerator)+",memory-backend="+ramID)
	b.add("-accel", accelArg(cfg.Accelerator))
	b.add("-cpu", cpuArg(machine, cfg))
	b.add("-smp", strconv.Itoa(cfg.VCPUs))
	b.memory(cfg)
	if cfg.Restore != nil {
		b.add("-incoming", fmt.Sprintf("fd:%d", fd.state))
	}
	b.add("-rtc", "base=utc")

	b.add("-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", fd.qmp))
	b.add("-mon", "chardev=qmp,mode=control")
	// The console is a pipe. When that is full, QEMU lets the guest's UART wait, and goes
	// on with all else.
	b.add("-add-fd", fmt.Sprintf("fd=%d,set=%d", fd.console, consoleSet))
	b.add("-chardev", fmt.Sprintf("file,id=console,append=on,path=/dev/fdset/%d", consoleSet))
	b.add("-serial", "chardev:console")

	// A guest that is restored has its kernel in its memory.
	if cfg.Restore == nil {
		b.add("-kernel", cfg.Kernel)
		if cfg.Initrd != "" {
			b.add("-initrd", cfg.Initrd)
		}
		b.add("-append", bootArgs(cfg, machine))
	}

	b.add("-device", b.virtio("virtio-rng"))
	for i, drive := range cfg.Drives {
		b.drive(i, drive, fd.disks[i])
	}
	if cfg.NIC != nil {
		b.nic(*cfg.NIC, fd.link)
	}
	if cfg.Channel {
		b.add("-device", b.serial())
		b.add("-chardev", fmt.Sprintf("socket,id=channel,fd=%d", fd.channel))
		b.add("-device", "virtserialport,chardev=channel,name="+vmm.ChannelPort)
	}
	return b.args
}

func machineArg(machine, accelerator string) string {
	switch machine {
	case machineQ35:
		// What a virtual machine has no use for, a guest can't attack.
		return "q35,sata=off,smbus=off,vmport=off"
	case machineVirt:
		return "virt"
	}
	if accelerator == vmm.KVM {
		// The clock, timer and interrupts come from KVM.
		return "microvm,acpi=on,rtc=on,isa-serial=on,pit=off,pic=off"
	}
	// Without PIT and PIC an emulated guest hangs when it calibrates its timers.
	return "microvm,acpi=on,rtc=on,isa-serial=on,pit=on,pic=on"
}

func accelArg(accelerator string) string {
	if accelerator == vmm.KVM {
		return "kvm"
	}
	return fmt.Sprintf("tcg,thread=multi,tb-size=%d", translationMiB)
}

func cpuArg(machine string, cfg vmm.Config) string {
	model := "max"
	switch {
	case cfg.Accelerator == vmm.KVM:
		model = "host"
	case machine != machineVirt:
		// Programs that believe the CPU to be fast at copying strings byte by byte do so,
		// and an emulated one is not: without, clones start 7 % faster.
		model = "max,erms=off,fsrm=off"
	}
	if machine == machineVirt || cfg.Nested {
		return model
	}
	// What a guest has no use for, it can't attack.
	return model + ",svm=off,vmx=off"
}

// bootArgs is the kernel's command line: what was asked for, without what keeps a
// guest from booting on this machine, and with what it needs.
//
// Under emulation that is norandmaps: code is translated once for each address that it runs
// at, so a shared library at another address in each process is translated by each process.
// Programs of a distribution start in a third of the time without. An argument
// sysctl.kernel.randomize_va_space=2 has them at random addresses again.
//
// And it is no_timer_check: the kernel counts timer interrupts for a
// moment, and panics if an emulated CPU on a busy host has missed them. It is not
// tsc=reliable, tempting as a clock is that can be read without leaving the emulated
// CPU: of some hundred boots with it, one ended with both CPUs in an endless run of
// interrupts.
func bootArgs(cfg vmm.Config, machine string) string {
	var words []string
	for word := range strings.FieldsSeq(cfg.BootArgs) {
		// Where the disks are on PCI, no PCI means no disks. The default arguments
		// have it because Firecracker's machine has no PCI.
		if word == "pci=off" && machine != machineMicroVM {
			continue
		}
		words = append(words, word)
	}
	if cfg.Accelerator == vmm.TCG {
		words = append(words, "norandmaps")
		if machine != machineVirt {
			words = append(words, "no_timer_check")
		}
	}
	return strings.Join(words, " ")
}

// builder collects arguments.
type builder struct {
	args []string
	bus  string // see busOf
}

func (b *builder) add(args ...string) { b.args = append(b.args, args...) }

// memory has a name of our own, so that it can be found in a saved guest's state. That
// of a saved guest is mapped from its file, and stays as it is there: what the guest
// writes goes to copies of the pages.
func (b *builder) memory(cfg vmm.Config) {
	size := fmt.Sprintf("%dM", cfg.MemoryMiB)
	b.add("-m", size)
	if cfg.Restore == nil {
		b.add("-object", fmt.Sprintf("memory-backend-ram,id=%s,size=%s", ramID, size))
		return
	}
	b.add("-object", fmt.Sprintf("memory-backend-file,id=%s,size=%s,share=off,mem-path=%s", ramID, size, escape(cfg.Restore.Memory)))
}

func (b *builder) virtio(device string) string { return device + "-" + b.bus }

// serial is the device of the guest channel's port. It has the fewest ports that can be:
// port 0 is for consoles. The usual 31 are 62 queues that the guest allocates, and that
// are all looked at when it is restored.
func (b *builder) serial() string {
	device := b.virtio("virtio-serial") + ",max_ports=2"
	if b.bus == "pci" {
		device += ",vectors=7" // an interrupt for each of the six queues, and one for changes
	}
	return device
}

func (b *builder) drive(index int, drive vmm.Drive, fds []int) {
	id := driveID(index)
	for n, fd := range fds {
		path := drive.Path // which is told to people who look at QEMU's process
		if n > 0 {
			path = drive.Backing[n-1].Path
		}
		b.add("-add-fd", fmt.Sprintf("fd=%d,set=%d,opaque=%s", fd, fd, escape(path)))
	}
	b.add("-blockdev", blockNode(id, drive, fds))
	b.add("-device", fmt.Sprintf("%s,id=%s,drive=%s,write-cache=on", b.virtio("virtio-blk"), deviceID(index), id))
}

func (b *builder) nic(nic vmm.NIC, fd int) {
	if nic.TAP != "" {
		// The interface is open already. Without vhost, which needs a right to a device,
		// QEMU moves the frames itself.
		b.add("-netdev", fmt.Sprintf("tap,id=net,fd=%d,vhost=off", fd))
	} else {
		// Datagrams on a pair of unix sockets: this netdev takes them in every version
		// of QEMU, though the manual speaks of TCP and UDP only.
		b.add("-netdev", fmt.Sprintf("socket,id=net,fd=%d", fd))
	}
	// A guest that is restored need not tell the network of it: the network is new.
	device := b.virtio("virtio-net") + ",netdev=net,guest_announce=off,mac=" + nic.MAC
	if nic.MTU != 0 {
		device += fmt.Sprintf(",host_mtu=%d", nic.MTU)
	}
	if b.bus == "pci" {
		device += ",romfile=" // no network boot
	}
	b.add("-device", device)
}

// escape quotes a path for an option's value, where a comma ends it.
func escape(path string) string { return strings.ReplaceAll(path, ",", ",,") }

// driveID is the name of the node that is a drive's disk when QEMU starts.
func driveID(index int) string { return driveName + strconv.Itoa(index) }

const driveName = "drive"

// deviceID is the name of a drive's device. What it is given stays with it, whichever node is
// its disk.
func deviceID(index int) string { return "disk" + strconv.Itoa(index) }

// devicePath is where QEMU's object model has the device that uses a drive's disk. On PCI
// that is a part of the one with the name.
func devicePath(machine string, index int) string {
	path := "/machine/peripheral/" + deviceID(index)
	if busOf(machine) == "pci" {
		path += "/virtio-backend"
	}
	return path
}
