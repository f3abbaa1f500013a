package cli

import (
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

// networkFlag adds --network.
func networkFlag(cmd *cobra.Command, network *smolvm.Network) {
	cmd.Flags().Func("network", "connect the guest by `MODE`: user (default), tap, bridge=NAME or none; after tap, ,pool=CIDR for its address, and after tap or bridge, ,open to reach other open VMs", func(text string) error {
		parsed, err := parseNetwork(text)
		parsed.ReceiveBitsPerSecond, parsed.SendBitsPerSecond = network.ReceiveBitsPerSecond, network.SendBitsPerSecond
		*network = parsed
		return err
	})
	complete(cmd, "network", words(modeNames()...))
}

// rateFlag adds --network-rate-limit.
func rateFlag(cmd *cobra.Command, network *smolvm.Network) {
	cmd.Flags().Func("network-rate-limit", "let the guest receive and send `RATE` Mbit a second each, or as in 500K, 1G; RECEIVE:SEND for two rates (default: no limit)", func(text string) (err error) {
		receive, send, two := strings.Cut(text, ":")
		if network.ReceiveBitsPerSecond, err = parseRate(receive); err != nil || !two {
			network.SendBitsPerSecond = network.ReceiveBitsPerSecond
			return err
		}
		network.SendBitsPerSecond, err = parseRate(send)
		return err
	})
	complete(cmd, "network-rate-limit", words())
}

func modeNames() []string {
	return []string{string(smolvm.NetworkUser), string(smolvm.NetworkTAP), string(smolvm.NetworkBridge) + "=", string(smolvm.NetworkNone)}
}

// parseNetwork reads MODE[=NAME][,pool=CIDR][,open]. Which mode takes what is checked later.
func parseNetwork(text string) (smolvm.Network, error) {
	var n smolvm.Network
	first, options, more := strings.Cut(text, ",")
	mode, name, named := strings.Cut(first, "=")
	n.Mode, n.Bridge = smolvm.NetworkMode(mode), name
	switch n.Mode {
	case smolvm.NetworkUser, smolvm.NetworkTAP, smolvm.NetworkNone:
		if named {
			return n, fmt.Errorf("mode %s takes no name", mode)
		}
	case smolvm.NetworkBridge:
		if name == "" {
			return n, fmt.Errorf("name the bridge, as in %s=br0", smolvm.NetworkBridge)
		}
	default:
		return n, fmt.Errorf("mode %q is not known; use %s, %s, %s=NAME or %s", mode, smolvm.NetworkUser, smolvm.NetworkTAP, smolvm.NetworkBridge, smolvm.NetworkNone)
	}
	for more {
		var option string
		option, options, more = strings.Cut(options, ",")
		key, value, _ := strings.Cut(option, "=")
		switch {
		case option == "open":
			n.OpenToVMs = true
		case key == "pool":
			pool, err := netip.ParsePrefix(value)
			if err != nil {
				return n, fmt.Errorf("pool %q is no network, such as 10.77.0.0/16", value)
			}
			n.Pool = pool
		default:
			return n, fmt.Errorf("option %q is not known; use pool=CIDR or open", option)
		}
	}
	return n, nil
}

// parseRate reads a rate in Mbit a second, or one with K, M or G, in bits a second.
func parseRate(text string) (int64, error) {
	units := map[string]float64{"K": 1e3, "M": 1e6, "G": 1e9}
	digits, factor := text, 1e6
	if n := len(text); n > 0 && units[strings.ToUpper(text[n-1:])] > 0 {
		digits, factor = text[:n-1], units[strings.ToUpper(text[n-1:])]
	}
	value, err := strconv.ParseFloat(digits, 64)
	if err != nil || !(value > 0) || math.IsInf(value, 0) || value*factor > smolvm.MaxNetworkRate {
		return 0, fmt.Errorf("invalid rate %q; use a number of Mbit a second, or one with K, M or G, as in 500K", text)
	}
	return int64(math.Round(value * factor)), nil
}
