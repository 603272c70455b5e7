"use strict";
(() => {
  const data = JSON.parse(document.getElementById("token-data").textContent);
  const tokens = [...document.querySelectorAll(".text i")];
  const numbers = new Map(tokens.map((token, index) => [token, index]));
  const tip = document.getElementById("tip");
  const shade = document.getElementById("shade");
  const closedBelow = 100; // thousandths
  let here = null;

  const figure = (value) => (value === 0 || value >= 0.001 ? value.toFixed(3) : value.toExponential(1));

  function line(list, name, value) {
    const term = document.createElement("dt");
    const definition = document.createElement("dd");
    term.textContent = name;
    definition.textContent = value;
    list.append(term, definition);
  }

  function show(token) {
    const at = numbers.get(token);
    const gates = Object.entries(data.gates);
    const title = document.createElement("b");
    const list = document.createElement("dl");
    title.textContent = data.words[data.token[at]];
    line(list, "p", figure(data.p[at]) + (data.p_after ? `, after: ${figure(data.p_after[at])}` : ""));
    line(list, "focus", figure(data.focus[at]));
    line(list, "gate", `${figure(data.gates[shade.value][at] / 1000)} (${shade.value})`);
    line(list, "rank", data.rank[at].toLocaleString("en"));
    line(list, "entropy", `${data.entropy[at].toFixed(2)} nats`);
    const own = data.rank[at] === 1 ? "the same" : data.words[data.choice[at]];
    line(list, "model's choice", `${own}, p ${figure(data.choice_p[at])}`);
    const others = gates.filter(([name]) => name !== shade.value);
    line(list, "other gates", others.map(([name, values]) => `${name} ${(values[at] / 1000).toFixed(2)}`).join(", "));
    tip.replaceChildren(title, list);
    if (here) here.classList.remove("here");
    here = token;
    here.classList.add("here");
    tip.hidden = false;
    const box = token.getClientRects()[0] || token.getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 12);
    const below = box.bottom + 8;
    const fits = below + tip.offsetHeight < window.innerHeight || box.top < tip.offsetHeight + 12;
    tip.style.left = `${Math.max(left, 8) + window.scrollX}px`;
    tip.style.top = `${(fits ? below : box.top - tip.offsetHeight - 8) + window.scrollY}px`;
  }

  function hide() {
    if (here) here.classList.remove("here");
    here = null;
    tip.hidden = true;
  }

  for (const text of document.querySelectorAll(".text")) {
    const mine = [...text.querySelectorAll("i")];
    text.addEventListener("mouseover", (event) => {
      const token = event.target.closest("i");
      if (token) show(token);
    });
    text.addEventListener("mouseleave", hide);
    text.addEventListener("click", (event) => {
      const token = event.target.closest("i");
      if (token) show(token);
    });
    text.addEventListener("focus", () => { if (mine.length && !mine.includes(here)) show(mine[0]); });
    text.addEventListener("blur", hide);
    text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      const next = mine[mine.indexOf(here) + step];
      if (next) { show(next); next.scrollIntoView({ block: "nearest" }); }
    });
  }

  shade.addEventListener("change", () => {
    const gates = data.gates[shade.value];
    tokens.forEach((token, index) => {
      token.style.setProperty("--g", Math.min(gates[index] / 1000, 1));
      token.toggleAttribute("data-c", gates[index] < closedBelow);
    });
  });
})();
