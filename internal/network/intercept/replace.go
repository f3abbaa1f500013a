package intercept

import (
	"encoding/base64"
	"net/http"
	"strings"
)

// replacer puts secrets into the headers of requests, and takes them out of those of answers.
type replacer struct {
	secrets []Secret
	hiding  *strings.Replacer
}

func newReplacer(secrets []Secret) *replacer {
	var pairs []string
	for _, secret := range secrets {
		pairs = append(pairs, secret.Value, secret.Placeholder)
	}
	return &replacer{secrets: secrets, hiding: strings.NewReplacer(pairs...)}
}

// fill replaces placeholders in the values of headers, and returns the names of the secrets
// that were put in. In HTTP's Basic scheme (RFC 7617), in which git sends a token, they are
// replaced in what is encoded. It reports false if the headers would be too long; they are not
// to be sent then.
func (r *replacer) fill(header http.Header) (names []string, ok bool) {
	f := filling{replacer: r, room: maxHeader, used: make([]bool, len(r.secrets))}
	for name, values := range header {
		for i, value := range values {
			if name == "Authorization" {
				value = f.basic(value)
			}
			values[i] = f.text(value)
		}
	}
	for i, used := range f.used {
		if used {
			names = append(names, r.secrets[i].Name)
		}
	}
	return names, f.room >= 0
}

// filling is the filling of the headers of one request.
type filling struct {
	*replacer
	room int // how many bytes the headers may grow by
	used []bool
}

// text replaces the placeholders in a text, unless there is no room for that.
func (f *filling) text(text string) string {
	for i, secret := range f.secrets {
		count := strings.Count(text, secret.Placeholder)
		if count == 0 {
			continue
		}
		f.used[i] = true
		f.room -= count * max(len(secret.Value)-len(secret.Placeholder), 0)
		if f.room < 0 {
			return text
		}
		text = strings.ReplaceAll(text, secret.Placeholder, secret.Value)
	}
	return text
}

// basic replaces the placeholders in what the Basic scheme encodes.
func (f *filling) basic(value string) string {
	scheme, encoded, _ := strings.Cut(value, " ")
	if !strings.EqualFold(scheme, "Basic") {
		return value
	}
	decoded, err := base64.StdEncoding.DecodeString(strings.TrimSpace(encoded))
	if err != nil {
		return value
	}
	filled := f.text(string(decoded))
	if filled == string(decoded) {
		return value
	}
	return scheme + " " + base64.StdEncoding.EncodeToString([]byte(filled))
}

// hide replaces the secrets in the values of headers by their placeholders, should the server
// have sent back what it was sent.
func (r *replacer) hide(header http.Header) {
	for _, values := range header {
		for i, value := range values {
			values[i] = r.hiding.Replace(value)
		}
	}
}
