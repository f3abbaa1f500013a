package smolvm

import "time"

// FlowRecord is one line of a VM's flow log: something that its guest had to do with the
// outside, or that a user has had it do. It was written by the VM's shim, outside of the guest;
// texts of the guest are cut, and what is not printable in them is escaped.
type FlowRecord struct {
	// Number is 1 for a VM's first record, and one more for each that follows.
	Number int64     `json:"number"`
	At     time.Time `json:"at"`
	// Kind says what the record is about, and so which fields it has.
	Kind FlowKind `json:"kind"`
	// Event is what happened to a flow. Empty: the record is about one moment.
	Event FlowEvent `json:"event,omitempty"`
	// Flow is a number that the records of one flow have in common, in one run of the VM.
	Flow int64 `json:"flow,omitempty"`

	// Run names the run of the VM that begins ([FlowStart]).
	Run string `json:"run,omitempty"`
	// Lost is how many records could not be written before this one ([FlowLost]), and Detail
	// why; in other records it says what ended a flow, if that was no proper end.
	Lost   int64  `json:"lost,omitempty"`
	Detail string `json:"detail,omitempty"`

	// Address is the address and port that a connection or datagrams go to, or come from
	// ([FlowForward]). Port is that of the guest ([FlowForward]).
	Address string `json:"address,omitempty"`
	Port    int    `json:"port,omitempty"`
	// Place is "host" or "vms" if the address is of the host itself, or in a network of VMs.
	Place string `json:"place,omitempty"`
	// Name is what was asked for ([FlowDNS]), or the name by which a connection was known.
	Name string `json:"name,omitempty"`
	// AskedNames are names, at most eight, that the guest was told the address for.
	AskedNames []string `json:"asked_names,omitempty"`
	// SNI and HTTPHost are what the connection itself has stated. HiddenName reports that it
	// states a name that can't be read.
	SNI        string `json:"sni,omitempty"`
	HTTPHost   string `json:"http_host,omitempty"`
	HiddenName bool   `json:"hidden_name,omitempty"`

	// Type is that of the question, as in "aaaa", Result what was answered, as in "noerror",
	// and Answers the addresses and aliases that the guest was told ([FlowDNS]).
	Type    string   `json:"type,omitempty"`
	Result  string   `json:"result,omitempty"`
	Answers []string `json:"answers,omitempty"`

	// Verdict is what the egress policy said of it, Rule the rule that decided, and Reason the
	// same in words. EgressRevision is that of the policy in force; zero: the VM had none.
	Verdict FlowVerdict `json:"verdict,omitempty"`
	Rule    string      `json:"rule,omitempty"`
	Reason  string      `json:"reason,omitempty"`
	// Closed is why it is closed always, if that decided: "host", "vms", "metadata", ...
	Closed         string `json:"closed,omitempty"`
	EgressRevision int64  `json:"egress_revision,omitempty"`
	// Secrets are the names of the secrets that were put into what was sent.
	Secrets []string `json:"secrets,omitempty"`

	// SentBytes are those that the guest has sent, and ReceivedBytes those that it has got, in
	// a flow that has ended. Duration is how long that took.
	SentBytes     int64         `json:"sent_bytes,omitempty"`
	ReceivedBytes int64         `json:"received_bytes,omitempty"`
	Duration      time.Duration `json:"-"` // "duration_ms"

	// Args are a command's ([FlowExec]), User and Dir whose and where it is. ExitCode and
	// Signal are how it ended, as the guest says; nil: it did not say.
	Args     []string `json:"args,omitempty"`
	User     string   `json:"user,omitempty"`
	Dir      string   `json:"dir,omitempty"`
	ExitCode *int     `json:"exit_code,omitempty"`
	Signal   string   `json:"signal,omitempty"`
	// Path is the guest's path that is copied to or from ([FlowCopy]).
	Path string `json:"path,omitempty"`

	// Prev is the Hash of the record before; the first has none. Hash is the SHA-256 of the
	// line up to it, in hexadecimal.
	Prev string `json:"prev,omitempty"`
	Hash string `json:"hash,omitempty"`

	// Line is the line of the log that the record was read from, without its line break.
	Line string `json:"-"`
}

// FlowKind is what a [FlowRecord] is about.
type FlowKind string

// The kinds of flow records.
const (
	// FlowStart is the beginning of a run of the VM.
	FlowStart FlowKind = "start"
	// FlowStop is its end. It is missing if the shim was killed.
	FlowStop FlowKind = "stop"
	// FlowLost tells of records that could not be written.
	FlowLost FlowKind = "lost"
	// FlowPolicy is a change of the egress policy while the VM runs.
	FlowPolicy FlowKind = "policy"
	// FlowDNS is a question for a name, and its answer.
	FlowDNS FlowKind = "dns"
	// FlowTCP and FlowUDP are connections, or datagrams from one port to one address, that the
	// guest has with the outside.
	FlowTCP FlowKind = "tcp"
	FlowUDP FlowKind = "udp"
	// FlowForward is a connection to a port of the guest, by a port forward or by smolvm.
	FlowForward FlowKind = "forward"
	// FlowExec is a command that smolvm has run in the guest.
	FlowExec FlowKind = "exec"
	// FlowCopyIn and FlowCopyOut are copies of files into the guest and out of it.
	FlowCopyIn  FlowKind = "copy-in"
	FlowCopyOut FlowKind = "copy-out"
	// FlowDial is a connection that smolvm has made to an address as the guest sees it.
	FlowDial FlowKind = "dial"
	// FlowSSH is a connection of an SSH client over the guest channel. What is done in it is
	// encrypted.
	FlowSSH FlowKind = "ssh"
)

// FlowEvent is what happened to a flow.
type FlowEvent string

// The events of flows.
const (
	// FlowOpen is a flow that was let through, and FlowClose its end.
	FlowOpen  FlowEvent = "open"
	FlowClose FlowEvent = "close"
	// FlowDeny is a flow that was not let through, or ended, by the policy.
	FlowDeny FlowEvent = "deny"
	// FlowFail is one that was allowed and did not come about: nobody answered, say.
	FlowFail FlowEvent = "fail"
)

// FlowVerdict is what an egress policy says of a flow or a question.
type FlowVerdict string

// The verdicts.
const (
	FlowAllowed FlowVerdict = "allowed"
	FlowDenied  FlowVerdict = "denied"
)

// FlowOptions are the options of [Flows.Flows].
type FlowOptions struct {
	// Follow goes on with records as they are written, until the VM has stopped.
	Follow bool
	// Unverified yields all lines that are records, whether they fit the chain or not.
	Unverified bool
}

// LearnOptions are the options of [Flows.LearnEgress].
type LearnOptions struct {
	// Denied learns from what was denied too, except from what is closed always.
	Denied bool
	// Wildcards allows all names below a registered domain, as in "*.example.com", where two
	// or more of them were seen.
	Wildcards bool
}

// LearnedEgress is a policy that was learned from a flow log.
type LearnedEgress struct {
	// Policy denies by default, and allows what was seen.
	Policy EgressPolicy `json:"policy"`
	// Flows is how many different destinations were seen.
	Flows int `json:"flows"`
	// Uncovered are flows that no rule allows, each with the reason.
	Uncovered []string `json:"uncovered"`
}
