package host

// CheckCopies is for tests that need package testenv, which needs this one.
var CheckCopies = checkCopies
