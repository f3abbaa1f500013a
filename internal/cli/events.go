package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/termsafe"
)

const eventsLong = `List the newest events of a VM, or of all VMs, the newest last. Events of VMs that have
been removed are kept. With --follow new events are printed as they happen, until the
command is interrupted; as JSON they are one object a line.`

func (a *app) eventsCommand() *cobra.Command {
	var limit int
	var follow bool
	cmd := &cobra.Command{
		Use:               "events [flags] [ID]",
		Short:             "List what happened to VMs",
		Long:              eventsLong,
		Args:              needs(0, 1, "at most one id"),
		ValidArgsFunction: first(a.vmIDs()),
	}
	cmd.Flags().IntVarP(&limit, "limit", "n", smolvm.DefaultEventLimit, "at most `N` events")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with events as they happen")
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
			if follow {
				return a.followEvents(cmd.Context(), m, id, events)
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

// followEvents prints events as they happen, after those that were there, until ctx is done.
func (a *app) followEvents(ctx context.Context, m smolvm.Service, id string, past []smolvm.Event) error {
	options := smolvm.WatchOptions{VM: id, After: -1}
	for _, event := range past {
		if err := a.printEvent(event); err != nil {
			return err
		}
		options.After = event.ID
	}
	for event, err := range m.Watch(ctx, options) {
		if err == nil {
			err = a.printEvent(event)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// printEvent prints an event in one line.
func (a *app) printEvent(e smolvm.Event) error {
	if a.json {
		return a.printJSONLine(e)
	}
	line := fmt.Sprintf("%s  %s  %s  %s  %s", e.At.Local().Format(time.DateTime), e.VMID, e.Action, took(e.Duration), e.Actor)
	if e.Detail != "" {
		line += "  " + e.Detail
	}
	return a.println(termsafe.Line(line))
}
