// The beginning of the script of a page, which embed.py puts there.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const place = id => document.getElementById(id);

// Makes an element. Texts of the data become text nodes, never HTML.
function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
// Returns the sign of a character that is invisible or changes the order of the text.
function sign(character) {
  const code = character.codePointAt(0);
  return code < 32 ? String.fromCodePoint(0x2400 + code)
    : `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
}
