//go:build !embedagent

package embedded

var (
	compressed []byte
	digest     string
)
