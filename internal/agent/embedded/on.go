//go:build embedagent

package embedded

import _ "embed"

// Both files are made by `make build`.

//go:embed smolvm-agent.gz
var compressed []byte

//go:embed smolvm-agent.sha256
var digest string
