package dockerfile

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/shell"
)

const (
	// epochArg is the argument that has the time of all that is made, in seconds.
	epochArg = "SOURCE_DATE_EPOCH"
	// maxExpanded is the longest text that variables may make of a word, in bytes.
	maxExpanded = 4 << 20
	// maxVariable is the longest value of a variable, in bytes: the longest that Linux hands to
	// a program.
	maxVariable = 128<<10 - 1
)

// replacing matches a variable in whose value something is replaced.
var replacing = regexp.MustCompile(`\$\{\w+/`)

// expand expands the variables in a word.
func (p *planner) expand(word string, env []string) (string, error) {
	return expandBy(shell.NewLex(p.escape), word, env)
}

func expandBy(lex *shell.Lex, word string, env []string) (string, error) {
	if err := checkGrowth(word, env); err != nil {
		return "", err
	}
	expanded, _, err := lex.ProcessWord(word, shell.EnvsFromSlice(env))
	if err != nil {
		return "", err
	}
	if strings.Contains(expanded, "\x00") {
		return "", fmt.Errorf("there is a NUL in %.200q", word)
	}
	return expanded, nil
}

// expandWords expands the variables in a word, and makes words of what they are then.
func (p *planner) expandWords(word string, env []string) ([]string, error) {
	if err := checkGrowth(word, env); err != nil {
		return nil, err
	}
	return shell.NewLex(p.escape).ProcessWords(word, shell.EnvsFromSlice(env))
}

// checkGrowth checks that a word can't become too long.
func checkGrowth(word string, env []string) error {
	count := strings.Count(word, "$")
	if count == 0 {
		return nil
	}
	longest := 1
	for _, one := range env {
		longest = max(longest, len(one))
	}
	size := len(word) + count*longest
	if replacing.MatchString(word) { // each byte of a value may become as long as the rest
		size *= longest
	}
	if size > maxExpanded {
		return fmt.Errorf("what variables make of %.100q may be longer than %d bytes", word, maxExpanded)
	}
	return nil
}

// setEnv sets a variable: in place of the one of that name, or behind the others.
func setEnv(env []string, name, value string) []string {
	for i, one := range env {
		if has, _, _ := strings.Cut(one, "="); has == name {
			env[i] = name + "=" + value
			return env
		}
	}
	return append(env, name+"="+value)
}

// lookup finds a variable.
func lookup(env []string, name string) (string, bool) {
	for _, one := range env {
		if has, value, _ := strings.Cut(one, "="); has == name {
			return value, true
		}
	}
	return "", false
}

// isProxy reports whether an argument is one of a proxy's, which need no ARG.
func isProxy(name string) bool {
	switch strings.ToLower(name) {
	case "http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy":
		return true
	}
	return false
}
