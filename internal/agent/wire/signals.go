package wire

// Signals of Linux by the names that SSH gives them (RFC 4254, section 6.10), and
// a few more that OpenSSH does not know but users send.
var signalNumbers = map[string]int{
	"HUP": 1, "INT": 2, "QUIT": 3, "ILL": 4, "TRAP": 5, "ABRT": 6, "BUS": 7, "FPE": 8,
	"KILL": 9, "USR1": 10, "SEGV": 11, "USR2": 12, "PIPE": 13, "ALRM": 14, "TERM": 15,
	"CHLD": 17, "CONT": 18, "STOP": 19, "TSTP": 20, "TTIN": 21, "TTOU": 22, "URG": 23,
	"XCPU": 24, "XFSZ": 25, "VTALRM": 26, "PROF": 27, "WINCH": 28, "IO": 29, "PWR": 30, "SYS": 31,
}

// SignalNumber returns the number of a signal by its name without "SIG"; zero if there
// is none of that name.
func SignalNumber(name string) int { return signalNumbers[name] }

// SignalName returns the name of a signal without "SIG"; empty if it has none.
func SignalName(number int) string {
	for name, n := range signalNumbers {
		if n == number {
			return name
		}
	}
	return ""
}
