package flowlog

import (
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/smolvm/smolvm"
)

// Limits of what a record has, whoever has chosen it. Texts are cut to so many bytes, before
// escapes.
const (
	maxText  = 256
	maxArgs  = 64 // of a command
	maxWords = 4 << 10
	maxNames = 8
	maxAnswers,
	maxSecrets = 16, 16
)

// Clean returns a record with bounded fields, in whose texts all is printable: other characters,
// and bytes that are no UTF-8, are escaped as in Go and C.
func Clean(r smolvm.FlowRecord) smolvm.FlowRecord {
	for _, field := range []*string{
		&r.Run, &r.Detail, &r.Address, &r.Place, &r.Name, &r.SNI, &r.HTTPHost, &r.Type, &r.Result,
		&r.Rule, &r.Reason, &r.Closed, &r.User, &r.Dir, &r.Signal,
	} {
		*field = text(*field, maxText)
	}
	r.Path = text(r.Path, maxWords)
	r.Kind = smolvm.FlowKind(text(string(r.Kind), maxText))
	r.Event = smolvm.FlowEvent(text(string(r.Event), maxText))
	r.Verdict = smolvm.FlowVerdict(text(string(r.Verdict), maxText))
	r.AskedNames = texts(r.AskedNames, maxNames, maxText, maxNames*maxText)
	r.Answers = texts(r.Answers, maxAnswers, maxText, maxAnswers*maxText)
	r.Secrets = texts(r.Secrets, maxSecrets, maxText, maxSecrets*maxText)
	r.Args = texts(r.Args, maxArgs, maxWords, maxWords)
	r.Number, r.Prev, r.Hash, r.Line = 0, "", "", ""
	return r
}

// more stands where a text or a list was cut.
const more = "…"

// text returns a text that is printable, of which at most so many bytes are kept.
func text(s string, most int) string {
	cut := len(s) > most
	if cut {
		s = s[:most]
	}
	if isPlain(s) && !cut {
		return s
	}
	var b strings.Builder
	for len(s) > 0 {
		r, size := utf8.DecodeRuneInString(s)
		switch {
		case r == utf8.RuneError && size == 1 && cut && !utf8.FullRuneInString(s):
			size = len(s) // the cut is in the middle of it
		case r == utf8.RuneError && size == 1:
			b.WriteString(`\x` + strconv.FormatUint(uint64(s[0])|0x100, 16)[1:])
		case strconv.IsPrint(r):
			b.WriteRune(r)
		default:
			quoted := strconv.QuoteRune(r)
			b.WriteString(quoted[1 : len(quoted)-1])
		}
		s = s[size:]
	}
	if cut {
		b.WriteString(more)
	}
	return b.String()
}

func isPlain(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// texts returns the first texts of a list, of which at most so many bytes are kept of each, and in
// all.
func texts(list []string, count, each, most int) []string {
	if len(list) == 0 {
		return nil
	}
	kept := make([]string, 0, min(len(list), count+1))
	for i, one := range list {
		if i == count || most <= 0 {
			return append(kept, more)
		}
		kept = append(kept, text(one, min(most, each)))
		most -= min(len(one), each)
	}
	return kept
}
