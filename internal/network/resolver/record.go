package resolver

import (
	"strings"

	"github.com/miekg/dns"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
)

// maxRecorded is how many answers to a question are recorded.
const maxRecorded = 16

// record records a question of the guest, and what it is told.
func (r *Resolver) record(query, answer *dns.Msg) {
	if len(query.Question) != 1 {
		return
	}
	question := query.Question[0]
	record := smolvm.FlowRecord{
		Kind: smolvm.FlowDNS, Name: strings.TrimSuffix(question.Name, "."),
		Type: strings.ToLower(dns.Type(question.Qtype).String()), Result: strings.ToLower(dns.RcodeToString[answer.Rcode]),
	}
	for _, one := range answer.Answer {
		if len(record.Answers) == maxRecorded {
			break
		}
		if addr, ok := addrOf(one); ok {
			record.Answers = append(record.Answers, addr.Unmap().String())
		} else if alias, ok := one.(*dns.CNAME); ok {
			record.Answers = append(record.Answers, strings.TrimSuffix(alias.Target, "."))
		}
	}
	policy := *r.policy()
	verdict := policy.Question(question.Name)
	verdict.Allowed = isPermitted(policy, question.Name) || isLocalhost(question.Name)
	network.AddVerdict(&record, verdict)
	r.recorder.Record(record)
}
