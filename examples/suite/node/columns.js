const leftPad = require("left-pad");

/** Returns numbers as a column that is as wide as the widest. */
function column(numbers) {
  const width = Math.max(...numbers.map((number) => `${number}`.length));
  return numbers.map((number) => leftPad(`${number}`, width));
}

module.exports = { column };
