package cli

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const eventsLong = `List what happened to a VM, or to all VMs: the newest events, the newest last. Events
of VMs that have been removed are kept.`

func (a *app) eventsCommand() *cobra.Command {
	var limit int
	cmd := &cobra.Command{
		Use:               "events [flags] [ID]",
		Short:             "List what happened to VMs",
		Long:              eventsLong,
		Args:              needs(0, 1, "at most one id"),
		ValidArgsFunction: first(a.vmIDs()),
	}
	cmd.Flags().IntVarP(&limit, "limit", "n", 100, "at most `N` events")
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		if limit < 1 {
			return usagef("--limit: give a number from 1 up")
		}
		var id string
		if len(args) > 0 {
			id = args[0]
		}
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			events, err := m.Events(cmd.Context(), smolvm.EventOptions{VM: id, Limit: limit})
			if err != nil {
				return err
			}
			if id != "" && len(events) == 0 {
				a.errorf("smolvm: no events of %s", id)
			}
			if a.json {
				return printList(a, events)
			}
			t := &table{titles: []string{"TIME", "VM", "ACTION", "TOOK", "ACTOR", "DETAIL"}, shrinks: []int{5, 4, 1}}
			for _, e := range events {
				t.add(e.At.Local().Format(time.DateTime), e.VMID, e.Action, took(e.Duration), e.Actor, e.Detail)
			}
			return a.print(t)
		})
	})
	return cmd
}
