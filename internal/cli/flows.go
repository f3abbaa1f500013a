package cli

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/termsafe"
)

const flowsLong = `Print a VM's flow log: the names that its guest asked for, its connections, the commands
that smolvm has run in it, and the files that were copied. It is written outside of the guest
while the VM runs, kept when it is stopped, and removed with it. If it is longer than 8 MiB,
its beginning is dropped.

A connection is one line, with the bytes that the guest has sent and received when it has ended.
With --follow the lines come as things happen, until the VM stops: a connection has one when
it begins, and one when it ends. With --json they are the lines of the log as they are, one object
a line.

Each line of the log has the hash of the one before it. If one was changed or removed, that is
an error; --unverified prints all lines that can be read.`

func (a *app) flowsCommand() *cobra.Command {
	var options smolvm.FlowOptions
	var tail int
	cmd := &cobra.Command{
		Use:               "flows [flags] ID",
		Short:             "Print what passed between a VM's guest and the outside",
		Long:              flowsLong,
		Args:              withID,
		ValidArgsFunction: first(a.vmIDs()),
	}
	cmd.Flags().BoolVarP(&options.Follow, "follow", "f", false, "go on until the VM stops")
	cmd.Flags().IntVarP(&tail, "tail", "n", 0, "only the last `N` records")
	cmd.Flags().BoolVar(&options.Unverified, "unverified", false, "print the log even if it was changed")
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		if tail < 0 || tail == 0 && cmd.Flags().Changed("tail") {
			return usagef("--tail: give a number from 1 up")
		}
		if tail > 0 && options.Follow {
			return usagef("--tail and --follow exclude each other")
		}
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			printer := &flowPrinter{app: a, tail: tail, lines: options.Follow, openFlows: map[string]int{}}
			for record, err := range m.Flows(cmd.Context(), args[0], options) {
				if err == nil {
					err = printer.add(record)
				}
				if err != nil {
					return withFlowHint(printer.finish(err), args[0])
				}
			}
			return printer.finish(nil)
		})
	})
	return cmd
}

func withFlowHint(err error, id string) error {
	if smolvm.CodeOf(err) != smolvm.CodeFlowLogChanged {
		return err
	}
	return withHint(err, "`smolvm flows --unverified %s` prints all lines that can be read", id)
}

// flowPrinter prints records in one of the ways in which they can be.
type flowPrinter struct {
	app   *app
	tail  int
	lines bool // as they come, each on a line

	kept      []smolvm.FlowRecord // for the table, or its end
	run       string
	openFlows map[string]int // by run and number: where the record of the beginning is
}

// add takes the next record.
func (p *flowPrinter) add(r smolvm.FlowRecord) error {
	switch {
	case p.app.json && p.tail == 0:
		return p.printJSON(r)
	case p.lines:
		return p.app.println(flowLine(r))
	}
	if r.Kind == smolvm.FlowStart {
		p.run = r.Run
	}
	if key := fmt.Sprint(p.run, "/", r.Flow); r.Flow != 0 && !p.app.json {
		if at, known := p.openFlows[key]; known && r.Event != smolvm.FlowOpen {
			// One row for a flow, where it began, and as it was when it ended.
			r.At = p.kept[at].At
			p.kept[at] = r
			delete(p.openFlows, key)
			return nil
		}
		p.openFlows[key] = len(p.kept)
	}
	p.kept = append(p.kept, r)
	return nil
}

func (p *flowPrinter) printJSON(r smolvm.FlowRecord) error {
	_, err := io.WriteString(p.app.Stdout, r.Line+"\n")
	return err
}

// finish prints what was kept, and returns the error with which the records have ended.
func (p *flowPrinter) finish(failure error) error {
	if p.tail > 0 {
		p.kept = p.kept[max(0, len(p.kept)-p.tail):]
	}
	if p.app.json || p.lines {
		for _, r := range p.kept {
			if err := p.printJSON(r); err != nil {
				return err
			}
		}
		return failure
	}
	t := &table{titles: []string{"TIME", "WHAT", "WITH", "SENT", "RECEIVED", "TOOK", "VERDICT"}, shrinks: []int{2, 6}}
	for _, r := range p.kept {
		t.addCells(flowCells(r)...)
	}
	if err := p.app.print(t); err != nil {
		return err
	}
	return failure
}

func flowCells(r smolvm.FlowRecord) []cell {
	sent, received, took := "", "", ""
	if hasEnded(r) {
		sent, received = strconv.FormatInt(r.SentBytes, 10), strconv.FormatInt(r.ReceivedBytes, 10)
		took = r.Duration.Round(time.Millisecond).String()
	}
	outcome := flowOutcome(r)
	if r.Event == smolvm.FlowOpen {
		outcome = strings.TrimPrefix(outcome+"; no end", "; ")
	}
	var cells []cell
	for _, text := range []string{r.At.Local().Format(time.DateTime), string(r.Kind), flowSubject(r), sent, received, took, outcome} {
		cells = append(cells, cell{text: text})
	}
	switch {
	case r.Event == smolvm.FlowDeny, r.Verdict == smolvm.FlowDenied, r.Kind == smolvm.FlowLost:
		cells[len(cells)-1].color = red
	case r.Event == smolvm.FlowFail:
		cells[len(cells)-1].color = yellow
	}
	return cells
}

// hasEnded reports whether a record is that of the end of a flow, which has numbers.
func hasEnded(r smolvm.FlowRecord) bool { return r.Duration > 0 || r.Event == smolvm.FlowClose }

// flowLine returns a record as one line.
func flowLine(r smolvm.FlowRecord) string {
	parts := []string{r.At.Local().Format(time.DateTime), strings.TrimSpace(string(r.Kind) + " " + string(r.Event))}
	if subject := flowSubject(r); subject != "" {
		parts = append(parts, subject)
	}
	if hasEnded(r) {
		parts = append(parts, fmt.Sprintf("sent %d, received %d bytes in %s", r.SentBytes, r.ReceivedBytes, r.Duration.Round(time.Millisecond)))
	}
	if outcome := flowOutcome(r); outcome != "" {
		parts = append(parts, outcome)
	}
	return termsafe.Text(strings.Join(parts, "  "))
}

// flowSubject returns what a record is about.
func flowSubject(r smolvm.FlowRecord) string {
	switch r.Kind {
	case smolvm.FlowDNS:
		text := r.Name + " " + r.Type
		if len(r.Answers) > 0 {
			text += " = " + strings.Join(r.Answers, ", ")
		}
		return text
	case smolvm.FlowTCP, smolvm.FlowUDP:
		if r.Name != "" {
			return r.Name + " (" + r.Address + ")"
		}
		return r.Address
	case smolvm.FlowForward:
		return strings.TrimSpace(r.Address + " to port " + strconv.Itoa(r.Port))
	case smolvm.FlowExec:
		return strings.Join(r.Args, " ")
	case smolvm.FlowCopyIn, smolvm.FlowCopyOut:
		return r.Path
	case smolvm.FlowDial:
		return r.Address + r.Path
	case smolvm.FlowStart, smolvm.FlowStop:
		return r.Run
	default:
		return ""
	}
}

// flowOutcome returns what became of what a record is about.
func flowOutcome(r smolvm.FlowRecord) string {
	var parts []string
	add := func(text string) {
		if text != "" {
			parts = append(parts, text)
		}
	}
	switch {
	case r.Kind == smolvm.FlowLost:
		add(fmt.Sprintf("%d records were lost", r.Lost))
	case r.Kind == smolvm.FlowDNS && r.Result != "noerror":
		add(r.Result)
	case r.Event == smolvm.FlowFail:
		add("failed")
	}
	switch {
	case r.Rule != "":
		add(fmt.Sprintf("%s by %s", r.Verdict, r.Rule))
	case r.Verdict == smolvm.FlowDenied:
		add(r.Reason)
	default:
		add(string(r.Verdict))
	}
	if r.Signal != "" {
		add("ended by SIG" + r.Signal)
	} else if r.ExitCode != nil {
		add("exit status " + strconv.Itoa(*r.ExitCode))
	}
	if len(r.Secrets) > 0 {
		add("with " + strings.Join(r.Secrets, ", "))
	}
	add(r.Detail)
	return strings.Join(parts, "; ")
}
