"use strict";
// Sortable tables: by the number behind a cell, else by its text.
for (const table of document.querySelectorAll("table")) {
  if (table.tBodies[0].rows.length < 3 || ["request", "environment"].includes(table.dataset.table)) continue;
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.setAttribute("role", "button");
    head.tabIndex = 0;
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[column];
        return cell.dataset.mean === undefined ? cell.textContent : Number(cell.dataset.mean);
      };
      const rank = (a, b) => {
        if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1; // dashes stay below
        const order = typeof a === "number" ? a - b : a.localeCompare(b);
        return down ? -order : order;
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => rank(key(a), key(b))));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
}

// Search trees: laid out anew whenever a branch is opened or closed.
const COLOURS = [[59, 76, 192], [33, 145, 140], [122, 193, 87], [253, 200, 37]];
const shade = (share) => {
  const place = Math.min(Math.max(share, 0), 1) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(place), COLOURS.length - 2);
  return `rgb(${COLOURS[low].map((c, i) => Math.round(c + (place - low) * (COLOURS[low + 1][i] - c))).join(",")})`;
};
const shape = (name, attributes, text) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
};

function showTree(view) {
  const tree = JSON.parse(view.dataset.tree);
  const children = tree.parent.map(() => []);
  tree.parent.forEach((parent, node) => { if (parent >= 0) children[parent].push(node); });
  const below = tree.parent.map(() => 0);
  for (let node = tree.parent.length - 1; node > 0; node--) below[tree.parent[node]] += 1 + below[node];
  const known = tree.value.filter((value) => value !== null);
  const low = Math.min(...known), span = Math.max(...known) - low || 1;
  const facts = document.createElement("div");
  facts.className = "facts";
  const closed = new Set();
  const closeRollouts = () => tree.visits.forEach((visits, node) => {
    if (node && visits <= 1 && children[node].length) closed.add(node);
  });

  const describe = (node) => {
    const name = tree.is_blocks ? "block" : "token";
    const meaning = tree.means[node] === null || tree.means[node] === undefined ? "" : ` (value ${tree.means[node]})`;
    const what = node ? `${name} ${tree.token[node]}${meaning}, p = ${tree.p[node]}` : "root";
    const value = tree.value[node] === null ? "no value yet" : `${tree.terminal[node] ? "reward" : "soft value"} ${tree.value[node]}`;
    return `${what}, ${value}, ${tree.visits[node]} visits${closed.has(node) ? `, ${below[node]} nodes closed` : ""}`;
  };

  const draw = (focused) => {
    const order = [], depth = [], height = [];
    let leaves = 0;
    const place = (node, level) => { // the trees are as deep as the horizon, so recursion is safe
      order.push(node);
      depth[node] = level;
      const open = closed.has(node) ? [] : children[node];
      open.forEach((child) => place(child, level + 1));
      height[node] = open.length ? (height[open[0]] + height[open[open.length - 1]]) / 2 : leaves++;
    };
    place(0, 0);
    const deepest = Math.max(...order.map((node) => depth[node]));
    const step = Math.max(38, Math.min(120, 980 / (deepest + 1.5)));
    const [width, tall] = [step * deepest + 150, leaves * 17 + 34];
    const x = (node) => 20 + step * depth[node], y = (node) => 20 + 17 * height[node];
    const svg = shape("svg", { width, height: tall, viewBox: `0 0 ${width} ${tall}`, role: "img" });
    for (const node of order.slice(1)) {
      const parent = tree.parent[node], middle = (x(parent) + x(node)) / 2;
      const thick = 0.7 + 4 * Math.sqrt(tree.visits[node] / Math.max(tree.visits[0], 1));
      svg.append(shape("path", { d: `M${x(parent)} ${y(parent)}C${middle} ${y(parent)} ${middle} ${y(node)} ${x(node)} ${y(node)}`,
        fill: "none", stroke: "#b5b5b5", "stroke-width": thick }));
    }
    for (const node of order) {
      const group = shape("g", { class: children[node].length ? "inner" : "leaf" });
      const fill = tree.value[node] === null ? "#fff" : shade((tree.value[node] - low) / span);
      const mark = { cx: x(node), cy: y(node), r: 5, fill, stroke: closed.has(node) ? "#1a1a1a" : "#fff", "stroke-width": 1.4 };
      group.append(shape("title", {}, describe(node)), shape("circle", mark));
      const label = closed.has(node) ? `${tree.token[node]} … +${below[node]}` : node ? tree.token[node] : "root";
      const ends = closed.has(node) || !children[node].length;
      const [dx, dy, anchor] = ends ? [8, 4, "start"] : node ? [-8, 4, "end"] : [0, -8, "middle"];
      group.append(shape("text", { x: x(node) + dx, y: y(node) + dy, "text-anchor": anchor }, label));
      group.addEventListener("mouseenter", () => { facts.firstChild.textContent = describe(node); });
      if (children[node].length) {
        group.setAttribute("tabindex", 0);
        const toggle = () => { closed.has(node) ? closed.delete(node) : closed.add(node); draw(node); };
        group.addEventListener("click", toggle);
        group.addEventListener("keydown", (event) => { if (event.key === "Enter") toggle(); });
        if (node === focused) setTimeout(() => group.focus({ preventScroll: true }));
      }
      svg.append(group);
    }
    view.querySelector("svg")?.remove();
    view.append(svg);
    facts.firstChild.textContent = describe(focused ?? 0);
  };

  const button = (name, act) => {
    const element = document.createElement("button");
    element.type = "button";
    element.textContent = name;
    element.addEventListener("click", () => { closed.clear(); act(); draw(); });
    facts.append(element);
  };
  facts.append(document.createElement("span"));
  button("open all", () => {});
  button("close rollouts", closeRollouts);
  view.append(facts);
  closeRollouts();
  draw();
}
document.querySelectorAll(".tree .view").forEach(showTree);
