package cli

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/vmm"
)

const lsLong = `List VMs, the oldest first: all of them, or those that meet all conditions. An ID may be
a pattern, as in 'web-*', in quotes so that the shell does not expand it; an ID that no
VM has is an error.`

const lsExample = `  smolvm ls 'web-*'
  smolvm ls --state running --label team=blue
  smolvm rm $(smolvm ls --quiet --label job=17)`

// lsFlags are the flags of ls.
type lsFlags struct {
	options smolvm.ListOptions
	state   string
	quiet   bool
}

func (a *app) lsCommand() *cobra.Command {
	var flags lsFlags
	cmd := &cobra.Command{
		Use:               "ls [flags] [ID...]",
		Aliases:           []string{"list", "ps"},
		Short:             "List VMs",
		Long:              lsLong,
		Example:           lsExample,
		ValidArgsFunction: a.vmIDs(),
	}
	cmd.Flags().StringVar(&flags.state, "state", "", "only VMs in `STATE`: "+strings.Join(stateNames(), ", "))
	cmd.Flags().StringVar(&flags.options.Image, "image", "", "only VMs of `IMAGE`: a name or a digest")
	cmd.Flags().FuncP("label", "l", "only VMs with the label `NAME=VALUE` (repeatable)", func(text string) error {
		if !strings.Contains(text, "=") {
			return fmt.Errorf("%q has no value; use NAME=VALUE", text)
		}
		return addLabel(&flags.options.Labels, text)
	})
	cmd.Flags().BoolVarP(&flags.quiet, "quiet", "q", false, "print ids only")
	complete(cmd, "state", words(stateNames()...))
	complete(cmd, "image", a.imageNames())
	complete(cmd, "label", a.labels())
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		if flags.state != "" && !slices.Contains(stateNames(), flags.state) {
			return usagef("--state: unknown state %q; use %s", flags.state, strings.Join(stateNames(), ", "))
		}
		flags.options.State, flags.options.IDs = smolvm.VMState(flags.state), args
		return a.list(cmd, flags)
	})
	return cmd
}

// list prints the VMs that the flags select. Ids of no VM are errors, in the end.
func (a *app) list(cmd *cobra.Command, flags lsFlags) error {
	return a.withManager(cmd.Context(), func(m smolvm.Service) error {
		vms, err := m.List(cmd.Context(), flags.options)
		if err != nil {
			return err
		}
		var missing []error
		for _, id := range distinct(flags.options.IDs) {
			listed := slices.ContainsFunc(vms, func(vm smolvm.VMInfo) bool { return vm.ID == id })
			if !listed && !strings.ContainsAny(id, `*?[\`) {
				// It may be one that another flag leaves out.
				_, err := m.Get(cmd.Context(), id)
				missing = append(missing, err)
			}
		}
		return errors.Join(a.printVMs(vms, flags.quiet), errors.Join(missing...))
	})
}

func (a *app) printVMs(vms []smolvm.VMInfo, quiet bool) error {
	switch {
	case a.json:
		return printList(a, vms)
	case quiet:
		for _, vm := range vms {
			if err := a.println(vm.ID); err != nil {
				return err
			}
		}
		return nil
	}
	return a.print(vmTable(vms, time.Now()))
}

func vmTable(vms []smolvm.VMInfo, now time.Time) *table {
	t := &table{
		titles:  []string{"ID", "STATE", "IMAGE", "CPUS", "MEMORY", "SSH", "PORTS", "AGE"},
		shrinks: []int{6, 2, 0},
	}
	for _, vm := range vms {
		t.addCells(
			cell{text: vm.ID},
			vmStateCell(vm),
			cell{text: boots(vm.Config)},
			cell{text: strconv.Itoa(vm.Config.VCPUs)},
			cell{text: mebibytes(vm.Config.MemoryMiB)},
			cell{text: sshAddress(vm)},
			cell{text: ports(vm.Network.PortForwards)},
			cell{text: age(vm.CreatedAt, now)},
		)
	}
	return t
}

// vmStateCell returns the cell with a VM's state; that of a paused VM tells who has paused
// it, or why, and that of one that runs if its agent can't be reached, else what is known of its health.
func vmStateCell(vm smolvm.VMInfo) cell {
	c := stateCell(vm.State)
	switch {
	case vm.State == smolvm.StateRunning && vm.Cause != "":
		c.text += " (unreachable)"
	case vm.State == smolvm.StateRunning && vm.Health != nil && vm.Health.Status == smolvm.HealthStarting:
		c.text += " (health: starting)"
	case vm.State == smolvm.StateRunning && vm.Health != nil:
		c.text += " (" + string(vm.Health.Status) + ")"
	case vm.State != smolvm.StatePaused:
	case vm.Cause == "":
		c.text += " (by user)"
	default:
		c.text += " (" + vmm.ShortCause(vm.Cause) + ")"
	}
	return c
}

// boots returns what a VM boots, in one word.
func boots(config smolvm.VMConfig) string {
	if config.UsesImage() {
		return config.Image
	}
	return filepath.Base(config.KernelPath)
}

// sshAddress returns where the VM's SSH port can be reached; empty while it can't.
func sshAddress(vm smolvm.VMInfo) string {
	if !vm.State.Alive() || vm.Network.SSHHostPort == 0 {
		return ""
	}
	return fmt.Sprintf("%s:%d", vm.Network.SSHHostAddr, vm.Network.SSHHostPort)
}

func ports(forwards []smolvm.PortForward) string {
	list := make([]string, len(forwards))
	for i, f := range forwards {
		list[i] = fmt.Sprintf("%d->%d", f.HostPort, f.GuestPort)
		if f.Protocol == smolvm.UDP {
			list[i] += "/udp"
		}
	}
	return strings.Join(list, ", ")
}
