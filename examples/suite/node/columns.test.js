const assert = require("node:assert");
const { test } = require("node:test");

const { column } = require("./columns.js");

test("numbers end at the right", () => {
  assert.deepStrictEqual(column([1, 200, 30]), ["  1", "200", " 30"]);
});
