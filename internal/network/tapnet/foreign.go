package tapnet

import (
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// Others' firewalls (Docker's, ufw's, firewalld's, an administrator's) decide about packets
// beside ours, and what one of them drops is lost: no rule of ours can accept it for good.
// Most drop what they don't know. So each such chain gets two rules at its end: just before
// the policy, or the first rule that drops whatever comes. Where packets are forwarded these
// let pass what comes from guests and what goes to them; where they are for the host itself,
// questions of guests to their name server, and the flows that the shims of VMs carry. All that others say explicitly about guests stays
// in force, and what guests may do is decided in our table.

// passMark is the comment of these rules.
const passMark = mark + "pass"

// passage is what a chain of others lacks, or has.
type passage struct {
	chain *nftables.Chain
	// before is the handle of the first rule that drops all; 0: the policy does.
	before uint64
	// have are the rules of ours that it has.
	have []*nftables.Rule
	// late reports that they come after a rule that drops all.
	late bool
}

// passes returns what the rules in a chain of others let pass; none: it is at a hook that does
// not matter.
func passes(c *nftables.Chain) []match {
	if c.Hooknum == nil {
		return nil
	}
	switch *c.Hooknum {
	case *nftables.ChainHookForward:
		return []match{fromGuests(), toGuests()}
	case *nftables.ChainHookInput:
		return []match{
			rule(fromGuests(), isQuestion(unix.IPPROTO_UDP)),
			rule(fromGuests(), isQuestion(unix.IPPROTO_TCP)),
			rule(fromGuests(), isCarried()),
		}
	}
	return nil
}

// passages returns which chains of others drop all that they don't know, and those that have
// rules of ours.
func (s state) passages(conn *nftables.Conn) ([]passage, error) {
	var found []passage
	for _, c := range s.chains {
		if isOurs(c.Table) || passes(c) == nil || !isIP(c.Table.Family) {
			continue
		}
		rules, err := conn.GetRules(c.Table, c)
		if err != nil {
			return nil, fmt.Errorf("list the rules of chain %s of table %s: %w", c.Name, c.Table.Name, err)
		}
		p := passage{chain: c}
		for _, r := range rules {
			if comment, ok := userdata.GetString(r.UserData, userdata.TypeComment); ok && comment == passMark {
				p.have = append(p.have, r)
				p.late = p.late || p.before != 0
				continue
			}
			if p.before == 0 && dropsAll(r) {
				p.before = r.Handle
			}
		}
		drops := p.before != 0 || c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop
		if drops || len(p.have) > 0 {
			found = append(found, p)
		}
	}
	return found, nil
}

func isIP(f nftables.TableFamily) bool {
	return slices.Contains([]nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6, nftables.TableFamilyINet}, f)
}

// dropsAll reports whether a rule drops or rejects whatever comes to it.
func dropsAll(r *nftables.Rule) bool {
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Counter, *expr.Log:
		case *expr.Reject:
			return true
		case *expr.Verdict:
			return e.Kind == expr.VerdictDrop
		case *expr.Target:
			return e.Name == "REJECT"
		case *expr.Match:
			if e.Name != "comment" {
				return false
			}
		default:
			return false
		}
	}
	return false
}

// openPassages adds the rules that chains of others lack to a transaction.
func openPassages(conn *nftables.Conn, all []passage) error {
	for _, p := range all {
		needed := passes(p.chain)
		if len(p.have) == len(needed) && !p.late {
			continue
		}
		for _, r := range p.have {
			if err := conn.DelRule(r); err != nil {
				return err
			}
		}
		for _, packets := range needed {
			r := &nftables.Rule{
				Table: p.chain.Table, Chain: p.chain, Position: p.before,
				Exprs:    rule(packets, match{&expr.Counter{}}, accept()),
				UserData: userdata.AppendString(nil, userdata.TypeComment, passMark),
			}
			if p.before != 0 {
				conn.InsertRule(r)
			} else {
				conn.AddRule(r)
			}
		}
	}
	return nil
}

// closePassages adds the removal of these rules to a transaction.
func closePassages(conn *nftables.Conn, all []passage) error {
	for _, p := range all {
		for _, r := range p.have {
			if err := conn.DelRule(r); err != nil {
				return err
			}
		}
	}
	return nil
}
