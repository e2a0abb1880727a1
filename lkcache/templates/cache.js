"use strict";
// Builds the token view from the JSON block. Every text of the cache goes through textContent.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const text = $("text"), law = $("law"), select = $("sequence");
  let tokens = [], laws = [], here = 0, held = -1;

  const element = (name, options = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(options)) {
      if (key === "text") made.textContent = value;
      else if (key === "class") made.className = value;
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  };
  const word = (id) => data.words[id] ?? "#" + id;
  // blanks and line ends are told by a mark, and kept as they are where the text flows
  const shown = (id) => word(id).replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "(empty)";
  const chance = (p) => (p >= 0.0995 ? p.toFixed(3) : p >= 0.00095 ? p.toFixed(4) : p === 0 ? "0" : p.toExponential(1));
  const bin = (logp) => data.bounds.filter((bound) => Math.exp(logp) < bound).length;

  const idle = () => {
    law.replaceChildren(element("p", { class: "ghost", text: "Choose a coloured token of the text." }));
  };

  const rows = (caption, list, said) => {
    const body = element("tbody");
    for (const [id, p] of list) {
      const bar = element("span", { class: "bar", "aria-hidden": "true" });
      bar.style.width = Math.max(1, Math.round(p * 72)) + "px";
      const name = element("th", { scope: "row" }, element("code", { text: shown(id) }));
      if (id === said) name.append(" ← said");
      body.append(element("tr", id === said ? { class: "said" } : {}, name,
        element("td", { class: "id", text: id }),
        element("td", { class: "p" }, bar, chance(p))));
    }
    const head = element("tr", {}, element("th", { scope: "col", class: "words", text: "token" }),
      element("th", { scope: "col", text: "id" }), element("th", { scope: "col", text: "p" }));
    head.children[0].style.textAlign = "left";
    head.children[1].style.textAlign = head.children[2].style.textAlign = "right";
    return element("table", {}, element("caption", { text: caption }), element("thead", {}, head), body);
  };

  const fact = (name, value) => element("div", {}, element("dt", { text: name }), element("dd", { text: value }));

  const show = (k) => {
    const { at, id, row } = laws[k];
    const [logp, kept, tail, ids, ps, sampleIds, samplePs, rank] = row;
    const list = ids.map((one, i) => [one, ps[i]]);
    const facts = element("dl", {}, fact("its p", chance(Math.exp(logp))), fact("log p, nats", logp.toFixed(3)));
    if (rank !== null) facts.append(fact("its rank", rank ? rank.toLocaleString("en") : "in the tail"));
    if (kept !== null) {
      facts.append(fact("kept ids", kept.toLocaleString("en")),
        fact("kept mass", (1 - tail).toFixed(4)), fact("tail mass", chance(tail)));
    }
    const title = element("h3", {}, element("code", { text: shown(id) }),
      element("span", { text: "position " + at + ", id " + id }));
    const parts = [title, facts];
    if (list.length) {
      const more = kept !== null && kept > list.length ? ", " + list.length + " of " + kept.toLocaleString("en") : "";
      parts.push(rows("The target’s alternatives" + more, list, id));
    }
    if (sampleIds.length) {
      parts.push(rows(sampleIds.length + " samples of the tail", sampleIds.map((one, i) => [one, samplePs[i]]), id));
    } else if (kept !== null && tail > 0) {
      parts.push(element("p", { class: "ghost", text: "No sample of the tail was drawn here." }));
    }
    law.replaceChildren(...parts);
    law.scrollTop = 0;
  };

  const go = (k, focus) => {
    if (!tokens.length) return;
    tokens[here].tabIndex = -1;
    tokens[here].classList.remove("here");
    here = Math.max(0, Math.min(tokens.length - 1, k));
    tokens[here].tabIndex = 0;
    tokens[here].classList.add("here");
    if (focus) tokens[here].focus();
    show(here);
  };
  const hold = (k) => {
    if (held >= 0) { tokens[held].classList.remove("held"); tokens[held].setAttribute("aria-pressed", "false"); }
    held = held === k ? -1 : k;
    if (held >= 0) { tokens[held].classList.add("held"); tokens[held].setAttribute("aria-pressed", "true"); }
  };

  const read = (n) => {
    const sequence = data.sequences[n];
    const pieces = document.createDocumentFragment();
    tokens = []; laws = []; here = 0; held = -1;
    let plain = null;
    if (sequence.first) pieces.append(element("span", { class: "plain", text: "(" + sequence.first.toLocaleString("en") + " earlier tokens are in the cache) … " }));
    sequence.tokens.forEach((id, n) => {
      const row = n ? sequence.rows[n - 1] : undefined, at = sequence.first + n;
      if (!row) {
        plain ??= pieces.appendChild(element("span", { class: "plain" }));
        plain.append(word(id));
        return;
      }
      plain = null;
      const b = bin(row[0]);
      const span = element("span", { class: "tok b" + b, role: "button", tabindex: -1, "aria-pressed": "false" });
      const raw = word(id);
      if (/^\s*$/.test(raw)) span.setAttribute("aria-label", shown(id));
      for (const piece of raw.split(/(\n)/)) {
        if (piece === "\n") span.append(element("span", { class: "mark", "aria-hidden": "true", text: "↵" }), "\n");
        else if (piece) span.append(piece);
      }
      if (!raw) span.append(element("span", { class: "mark", text: "∅" }));
      span.dataset.k = tokens.length;
      tokens.push(span);
      laws.push({ at, id, row });
      pieces.append(span);
    });
    if (sequence.cut) pieces.append(element("span", { class: "plain", text: " … (" + sequence.cut.toLocaleString("en") + " more tokens are in the cache)" }));
    text.replaceChildren(pieces);
    text.setAttribute("aria-label", "Tokens of sequence " + sequence.id);
    text.scrollTop = 0;
    $("previous").disabled = n === 0;
    $("next").disabled = n === data.sequences.length - 1;
    idle();
    if (tokens.length) {
      // open on the most surprising of the first tokens: there is something to see
      let first = 0;
      laws.slice(0, 40).forEach((one, k) => { if (one.row[0] < laws[first].row[0]) first = k; });
      go(first, false);
    }
  };

  const under = (event) => {
    const token = event.target.closest?.(".tok");
    return token ? Number(token.dataset.k) : -1;
  };
  text.addEventListener("mouseover", (event) => { const k = under(event); if (k >= 0 && held < 0) go(k, false); });
  text.addEventListener("focusin", (event) => { const k = under(event); if (k >= 0 && held < 0 && k !== here) go(k, false); });
  text.addEventListener("click", (event) => {
    const k = under(event);
    if (k < 0) return;
    hold(k);
    go(k, true);
  });
  text.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tokens.length - 1 };
    if (event.key === "ArrowDown" || event.key === "ArrowUp") steps[event.key] = line(event.key === "ArrowDown" ? 1 : -1);
    if (event.key in steps && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      if (held >= 0) hold(held);
      go(steps[event.key], true);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      hold(here);
    } else if (event.key === "Escape" && held >= 0) hold(held);
  });
  // the token nearest to this one, a line further down or up
  const line = (step) => {
    const box = tokens[here].getBoundingClientRect();
    let best = here, distance = Infinity, row = null;
    for (let k = here + step; k >= 0 && k < tokens.length; k += step) {
      const other = tokens[k].getBoundingClientRect();
      if (Math.abs(other.top - box.top) < 4) continue;
      row ??= other.top;
      if (Math.abs(other.top - row) > 4) break;
      const gap = Math.abs(other.left - box.left);
      if (gap < distance) { distance = gap; best = k; }
    }
    return best;
  };

  const groups = new Map();
  data.sequences.forEach((sequence, n) => {
    if (!groups.has(sequence.domain)) groups.set(sequence.domain, element("optgroup", { label: sequence.domain }));
    groups.get(sequence.domain).append(element("option", { value: n, text: sequence.index + ": " + sequence.id }));
  });
  select.append(...groups.values());
  const order = [...select.options].map((option) => Number(option.value));
  const move = (step) => {
    select.selectedIndex += step;
    pick();
  };
  const pick = () => {
    read(Number(select.value));
    $("previous").disabled = select.selectedIndex === 0;
    $("next").disabled = select.selectedIndex === order.length - 1;
  };
  select.addEventListener("change", pick);
  $("previous").addEventListener("click", () => move(-1));
  $("next").addEventListener("click", () => move(1));
  if (data.sequences.length) {
    $("reader").hidden = false;
    select.selectedIndex = 0;
    pick();
  }
})();
