package cli

import (
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/size"
)

// vmFlags are the flags that describe a new VM.
type vmFlags struct {
	config  smolvm.VMConfig
	egress  egressFlags
	secrets secretFlags
	health  healthFlags
	pull    smolvm.PullPolicy
	quiet   bool
}

// creation returns the options by which a VM is created.
func (f *vmFlags) creation(a *app) smolvm.CreateOptions {
	return smolvm.CreateOptions{Pull: f.pull, Progress: a.progress.report()}
}

func (f *vmFlags) register(cmd *cobra.Command) {
	flags, config := cmd.Flags(), &f.config
	flags.StringVar(&config.ID, "name", "", "`ID` of the VM (default: made up)")
	machineFlags(cmd, &config.VCPUs, &config.MemoryMiB, "")
	diskSizeFlag(cmd, &config.DiskSizeMiB)
	flags.Float64Var(&config.CPULimit, "cpus", 0, "let the VM take the time of `N` of the host's CPUs, as in 0.5 (default: no limit)")
	flags.Func("disk-bps", "let the VM read and write `SIZE` a second on all its disks: MiB, or as in 512K (default: no limit)", func(text string) (err error) {
		config.DiskBytesPerSecond, err = size.ParseBytes(text)
		return err
	})
	flags.Int64Var(&config.DiskIOPS, "disk-iops", 0, "let the VM make `N` reads and writes a second on all its disks (default: no limit)")
	flags.BoolVar(&config.NestedVirtualization, "nested", false, "let the guest run VMs itself, if its kernel has KVM")
	flags.Func("drive", "attach a disk image: `PATH[:ro][:FORMAT]`, raw (default) or qcow2, with ,backing=PATH:FORMAT after it for each file that it is based on (repeatable)", func(text string) error {
		drive, err := parseDrive(text)
		config.Drives = append(config.Drives, drive)
		return err
	})
	flags.FuncP("volume", "v", "give the guest a directory of the host: `DIR:TARGET[:ro|:rw|:overlay]` (repeatable)", func(text string) error {
		mount, err := parseMount(text)
		config.Mounts = append(config.Mounts, mount)
		return err
	})
	flags.FuncP("publish", "p", "forward a port: `[[ADDR:]HOSTPORT:]GUESTPORT[/PROTOCOL]`, or ranges of ports (repeatable)", func(text string) error {
		forwards, err := parseForwards(text)
		config.PortForwards = append(config.PortForwards, forwards...)
		return err
	})
	networkFlag(cmd, &config.Network)
	rateFlag(cmd, &config.Network)
	f.egress.register(cmd)
	f.secrets.register(cmd)
	flags.FuncP("env", "e", "set a variable for all commands: `NAME[=VALUE]` (repeatable)", f.addEnv)
	flags.FuncP("label", "l", "attach a label to find the VM by: `NAME[=VALUE]` (repeatable)", func(text string) error {
		return addLabel(&config.Labels, text)
	})
	flags.BoolVarP(&config.PublishAll, "publish-all", "P", false, "forward a free port to each port that the image exposes")
	flags.StringVar(&config.Init, "init", "", "run the image's own init at `PATH` as the first process (default: what the image says, or /sbin/init)")
	flags.Lookup("init").NoOptDefVal = smolvm.InitAuto
	flags.StringVar(&config.StopSignal, "stop-signal", "", "`SIGNAL` for the VM's processes when it is stopped (default: the image's, else SIGTERM)")
	f.health.register(cmd)
	flags.Func("entrypoint", "run `PROGRAM` in place of the image's entrypoint; empty for none", func(text string) error {
		config.Entrypoint = []string{text}
		return nil
	})
	flags.Func("pull", "`WHEN` an image of a registry is pulled: missing (default), always or never", func(text string) error {
		f.pull = smolvm.PullPolicy(text)
		return checkPull(f.pull)
	})
	warmUpFlag(cmd, &config.WarmUp)
	flags.StringVar(&config.Hostname, "hostname", "", "`NAME` of the guest (default: the id)")
	flags.DurationVar(&config.TTL, "ttl", 0, "stop the VM when it has run for `DURATION`, as in 90s or 2h")
	flags.TextVar(&config.SSHHostAddr, "ssh-addr", netip.Addr{}, "offer SSH on the host's `ADDR` (default 127.0.0.1)")
	flags.Func("authorized-key", "let the public key in `FILE` log in (repeatable)", f.addKey)

	flags.StringVar(&config.KernelPath, "kernel", "", "boot the kernel in `FILE` instead of an image")
	flags.StringVar(&config.InitrdPath, "initrd", "", "initramfs for --kernel in `FILE`")
	flags.StringVar(&config.RootfsPath, "rootfs", "", "root file system for --kernel: a disk image in `FILE`")
	flags.StringVar((*string)(&config.RootfsFormat), "rootfs-format", "", "`FORMAT` of --rootfs: raw (default) or qcow2")
	flags.Func("rootfs-backing", "what a qcow2 --rootfs is based on: `PATH:FORMAT`, the nearest file first (repeatable)", func(text string) error {
		file, err := parseDiskFile(text)
		config.RootfsBacking = append(config.RootfsBacking, file)
		return err
	})
	flags.StringVar((*string)(&config.DiskMode), "disk-mode", "", "`MODE` of --rootfs: isolated (default) or shared, which writes to it")
	flags.StringVar(&config.BootArgs, "boot-args", "", "kernel `ARGUMENTS` (default: those of the image)")
	flags.StringVar((*string)(&config.Ready), "ready", "", "`WHEN` the VM counts as running: agent, ssh or started")
	flags.BoolVarP(&f.quiet, "quiet", "q", false, "don't show the progress of pulling or building an image")

	complete(cmd, "pull", words(string(smolvm.PullMissing), string(smolvm.PullAlways), string(smolvm.PullNever)))
	complete(cmd, "entrypoint", words())
	complete(cmd, "init", words())
	complete(cmd, "stop-signal", words())
	complete(cmd, "ready", words(string(smolvm.ReadyAgent), string(smolvm.ReadySSH), string(smolvm.ReadyStarted)))
	complete(cmd, "rootfs-format", words(string(smolvm.FormatRaw), string(smolvm.FormatQCOW2)))
	complete(cmd, "disk-mode", words(string(smolvm.DiskIsolated), string(smolvm.DiskShared)))
	for _, name := range []string{"name", "cpus", "disk-bps", "disk-iops", "publish", "env", "label", "hostname", "ttl", "ssh-addr", "boot-args"} {
		complete(cmd, name, words())
	}
}

// machineFlags adds the flags for how many CPUs and how much memory a VM has. The purpose is what help
// says that they are for, as in " for RUN"; it may be empty.
func machineFlags(cmd *cobra.Command, vcpus, memoryMiB *int, purpose string) {
	flags := cmd.Flags()
	flags.IntVar(vcpus, "vcpus", 0, fmt.Sprintf("`N` virtual CPUs%s (default %d)", purpose, smolvm.DefaultVCPUs))
	flags.FuncP("memory", "m", fmt.Sprintf("memory of `SIZE`%s: MiB, or as in 2G (default %d)", purpose, smolvm.DefaultMemoryMiB), func(text string) error {
		size, err := parseMebibytes(text)
		*memoryMiB = int(size)
		return err
	})
	complete(cmd, "vcpus", words())
	complete(cmd, "memory", words())
}

// diskSizeFlag adds the flag for how large a VM's disk is.
func diskSizeFlag(cmd *cobra.Command, mebibytes *int64) {
	cmd.Flags().Func("disk-size", "disk of `SIZE`: MiB, or as in 8G (default: as the image)", func(text string) (err error) {
		*mebibytes, err = parseMebibytes(text)
		return err
	})
	complete(cmd, "disk-size", words())
}

func checkPull(policy smolvm.PullPolicy) error {
	switch policy {
	case smolvm.PullMissing, smolvm.PullAlways, smolvm.PullNever:
		return nil
	}
	return fmt.Errorf("%q is not known; use %s, %s or %s", policy, smolvm.PullMissing, smolvm.PullAlways, smolvm.PullNever)
}

func (f *vmFlags) addEnv(text string) error {
	name, value, err := parseEnv(text)
	if err != nil {
		return err
	}
	if f.config.Env == nil {
		f.config.Env = map[string]string{}
	}
	f.config.Env[name] = value
	return nil
}

func (f *vmFlags) addKey(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			f.config.AuthorizedKeys = append(f.config.AuthorizedKeys, line)
		}
	}
	return nil
}

// addLabel adds a label that is given as NAME=VALUE, or NAME for an empty value.
func addLabel(labels *map[string]string, text string) error {
	name, value, _ := strings.Cut(text, "=")
	if err := smolvm.ValidateLabel(name, value); err != nil {
		return err
	}
	if *labels == nil {
		*labels = map[string]string{}
	}
	(*labels)[name] = value
	return nil
}

// resolve returns the configuration of a VM of that image; empty: the default one,
// or none if a kernel was given.
func (f *vmFlags) resolve(a *app, image string) (config smolvm.VMConfig, err error) {
	config = f.config
	if config.Egress, err = f.egress.policy(); err != nil {
		return config, err
	}
	if config.Secrets, err = f.secrets.all(); err != nil {
		return config, err
	}
	if config.Healthcheck, err = f.health.check(); err != nil {
		return config, err
	}
	config.NoHealthcheck = f.health.none
	config.Image = image
	config.Backend = a.backend
	if !f.quiet {
		a.progress = newProgress(a.Stderr)
	}
	return config, nil
}
