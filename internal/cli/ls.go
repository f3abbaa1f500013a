package cli

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
)

func (a *app) lsCommand() *cobra.Command {
	var state string
	var quiet bool
	cmd := &cobra.Command{
		Use:               "ls [flags]",
		Aliases:           []string{"list", "ps"},
		Short:             "List VMs",
		Long:              "List all VMs, or those in one state, the oldest first.",
		Args:              needs(0, 0, "no arguments"),
		ValidArgsFunction: words(),
	}
	cmd.Flags().StringVar(&state, "state", "", "only VMs in `STATE`: "+strings.Join(stateNames(), ", "))
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print ids only")
	complete(cmd, "state", words(stateNames()...))
	cmd.RunE = a.does(func(cmd *cobra.Command, _ []string) error {
		if state != "" && !slices.Contains(stateNames(), state) {
			return usagef("--state: %q is no state; use %s", state, strings.Join(stateNames(), ", "))
		}
		return a.withManager(cmd.Context(), func(m *manager.Manager) error {
			vms, err := m.List(cmd.Context(), manager.ListOptions{State: smolvm.VMState(state)})
			switch {
			case err != nil:
				return err
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
		})
	})
	return cmd
}

func vmTable(vms []smolvm.VMInfo, now time.Time) *table {
	t := &table{
		titles:  []string{"ID", "STATE", "IMAGE", "CPUS", "MEMORY", "SSH", "PORTS", "AGE"},
		shrinks: []int{6, 2, 0},
	}
	for _, vm := range vms {
		t.addCells(
			cell{text: vm.ID},
			stateCell(vm.State),
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

// boots says what a VM boots.
func boots(config smolvm.VMConfig) string {
	if config.UsesImage() {
		return config.Image
	}
	return filepath.Base(config.KernelPath)
}

// sshAddress is where the VM's SSH port can be reached; empty while it can't.
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
