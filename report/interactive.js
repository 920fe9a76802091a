// Draws the charts that kvneox_lib.pages.interactive describes: lines, a choice of method, panel and place, values on
// pointing at them or by the keyboard. Plain SVG, from the JSON that stands in each chart; nothing is loaded.
"use strict";
(() => {
  const LETTERS = 12, REACH = 24, TOGETHER = 6, GREY = "#b8b8b8", DASHES = { ":": "1 4", "--": "6 3", "-.": "6 3 1 3" };
  const WAYS = { ArrowLeft: ["x", -1], ArrowRight: ["x", 1], ArrowUp: ["y", -1], ArrowDown: ["y", 1] };
  const make = (name, attributes, parent, text) => {
    const made = document.createElementNS(name === "svg" ? "http://www.w3.org/2000/svg" : parent.namespaceURI, name);
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  };

  const ticksOf = (low, high) => { // the last is not below `high`: an axis of shares ends at 1
    const power = 10 ** Math.floor(Math.log10((high - low) / 5));
    const step = [1, 2, 5, 10].map((n) => n * power).find((size) => size >= (high - low) / 5);
    const first = Math.ceil(low / step - 1e-9), last = Math.ceil(high / step - 1e-9);
    return Array.from({ length: last - first + 1 }, (_, i) => +((first + i) * step).toPrecision(6));
  };

  const apart = (places, step, top, bottom) => { // upwards from the lowest, then down again where that was too high
    const order = places.map((_, i) => i).sort((a, b) => places[b] - places[a]), found = [];
    order.forEach((name, i) => found.push(Math.min(places[name], i ? found[i - 1] - step : bottom)));
    found.reduceRight((least, place, i) => (found[i] = Math.max(place, least)) + step, top);
    return places.map((_, i) => found[order.indexOf(i)]);
  };

  function chart(box) {
    const data = JSON.parse(box.querySelector("script").textContent);
    const all = data.panels.flatMap((panel) => panel.lines), names = [...new Set(all.map((line) => line.name))];
    const points = all.flatMap((line) => line.points), xs = [...new Set(points.map((p) => p[0]))].sort((a, b) => a - b);
    const values = points.flatMap((point) => point.slice(1)).filter((value) => value !== null);
    const low = Math.min(0, ...values), ticks = ticksOf(low, Math.max(...values)), high = ticks[ticks.length - 1];
    const pad = (high - low) * 0.04 || 1, digits = (value) => value.toFixed(data.digits);
    const written = ([, y, from, to]) => digits(y) + (from === null ? "" : ` [${digits(from)}, ${digits(to)}]`);
    const sorted = (spots) => [...spots].sort((a, b) => (data.lowest_first ? 1 : -1) * (a.point[1] - b.point[1]));
    const controls = make("div", {}, box), choice = (label, options) => {
      const select = make("select", {}, make("label", {}, controls, `${label} `));
      options.forEach((option, i) => make("option", { value: i }, select, option));
      select.addEventListener("change", draw);
      return select;
    };
    const panels = data.panels.length > 1 && choice("情形", data.panels.map((panel) => panel.title));
    const presses = choice("方法", ["（几种常看的）", ...names]), places = choice(data.xlabel, ["（不列出）", ...xs]);
    const label = `${data.ylabel}与${data.xlabel}的图：左右键换${data.xlabel}，上下键换方法，Esc 收起数值`;
    const svg = make("svg", { tabindex: 0, role: "application", "aria-label": label }, box);
    const tip = make("div", { class: "tip", "aria-live": "polite" }, box), list = make("div", {}, box);
    let spots, ring, here; // the points as they lie in the drawing; the mark on the one spoken of; that one

    function draw() {
      const panel = data.panels[panels ? panels.value : 0], chosen = names[presses.value - 1];
      const isFront = (line) => (chosen ? line.name === chosen : line.front), front = panel.lines.filter(isFront);
      const width = Math.max(300, box.clientWidth), height = Math.max(260, Math.min(380, width * 0.6));
      const left = 48, top = 10, bottom = height - 40, middle = (top + bottom) / 2;
      const right = width - 12 - Math.max(50, ...front.map((line) => line.name.length * 0.6 * LETTERS));
      const x = (at) => left + 10 + ((at - xs[0]) / (xs[xs.length - 1] - xs[0] || 1)) * (right - left - 20);
      const y = (value) => bottom - ((value - low + pad) / (high - low + 2 * pad)) * (bottom - top);
      const text = (x, y, anchor, said, more) => make("text", { x, y, "text-anchor": anchor, ...more }, svg, said);
      svg.replaceChildren();
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      ticks.forEach((value) => {
        make("line", { x1: left, x2: right, y1: y(value), y2: y(value), stroke: "#ddd" }, svg);
        text(left - 5, y(value) + 4, "end", value);
      });
      xs.filter((at, i) => !(x(xs[i + 1]) - x(at) < 26)).forEach((at) => text(x(at), bottom + 16, "middle", at));
      text((left + right) / 2, height - 6, "middle", data.xlabel);
      text(12, middle, "middle", data.ylabel, { transform: `rotate(-90 12 ${middle})` });
      const lines = [...panel.lines].sort((a, b) => isFront(a) - isFront(b));
      spots = lines.flatMap((line) => drawLine(line, isFront(line), x, y));
      const ends = front.map((line) => line.points[line.points.length - 1]);
      apart(ends.map((end) => y(end[1])), LETTERS + 2, top, bottom).forEach((place, i) => {
        const leader = { x1: x(ends[i][0]) + 5, y1: y(ends[i][1]), x2: right + 4, y2: place, stroke: GREY };
        make("line", { ...leader, "stroke-dasharray": "1 2" }, svg);
        text(right + 6, place + 4, "start", front[i].name, { style: `fill: ${front[i].letters}` });
      });
      ring = make("circle", { r: 7, fill: "none", stroke: "currentColor" }, svg);
      here = spots.find((spot) => spot.isFront) || spots[0];
      say([]);
      listValues(panel.title, xs[places.value - 1]);
    }

    function drawLine(line, isFront, x, y) { // gives its points
      const stroke = isFront ? line.colour : GREY, d = `M${line.points.map((p) => `${x(p[0])} ${y(p[1])}`).join("L")}`;
      const look = { stroke, "stroke-width": isFront ? 2 : 1, "stroke-dasharray": DASHES[line.dash] || "none" };
      make("path", { "data-press": line.name, d, fill: "none", ...look }, svg);
      (isFront ? line.points : []).forEach(([at, value, from, to]) => {
        if (from !== null) make("path", { d: `M${x(at)} ${y(from)}V${y(to)}`, stroke }, svg);
        const transform = `translate(${x(at)} ${y(value)}) scale(8)`, fill = line.hollow ? "#fff" : stroke;
        make("path", { d: line.marker, "stroke-width": 0.15, stroke, fill, transform }, svg);
      });
      return line.points.map((point) => ({ name: line.name, point, isFront, x: x(point[0]), y: y(point[1]) }));
    }

    function say(found) { // the values of points at one place; the first gets the ring
      const rows = sorted(found).map(({ name, point }) => `\n${name}：${written(point)}`);
      tip.textContent = found.length ? `${data.xlabel} ${found[0].point[0]}${rows.join("")}` : "";
      ring.setAttribute("visibility", found.length ? "visible" : "hidden");
      here = found[0] || here;
      ring.setAttribute("transform", `translate(${here.x} ${here.y})`);
      const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      tip.style.left = `${Math.max(0, Math.min(here.x * scale + 8, box.clientWidth - tip.offsetWidth))}px`;
      tip.style.top = `${controls.offsetHeight + here.y * scale + 12}px`;
    }

    function point(event) { // at the nearest, and those that lie with it
      const { left, top, width } = svg.getBoundingClientRect(), scale = width / svg.viewBox.baseVal.width;
      const far = ({ x, y }) => Math.hypot(x * scale + left - event.clientX, y * scale + top - event.clientY);
      const nearest = spots.reduce((best, spot) => (far(spot) < far(best) ? spot : best));
      const beside = spots.filter((spot) => spot.x === nearest.x && Math.abs(spot.y - nearest.y) <= TOGETHER);
      say(far(nearest) > REACH ? [] : [nearest, ...beside.filter((spot) => spot !== nearest)]);
    }

    function walk(event) {
      if (event.key === "Escape") say([]);
      const way = WAYS[event.key];
      if (!way) return;
      event.preventDefault();
      const [axis, step] = way, same = axis === "x" ? "name" : "x";
      const row = spots.filter((spot) => spot[same] === here[same]).sort((a, b) => a[axis] - b[axis]);
      say([row[row.indexOf(here) + step] || here]);
    }

    function listValues(title, at) {
      const rows = sorted(spots.filter(({ point }) => point[0] === at));
      list.replaceChildren();
      if (!rows.length) return;
      const table = make("table", {}, list), where = `${title} ${data.xlabel} ${at}`.trim();
      make("caption", {}, table, `${where}：${data.ylabel}，方括号里是 95 % 区间`);
      const row = (cells) => cells.reduce((row, cell) => (make("td", {}, row, cell), row), make("tr", {}, table));
      rows.forEach(({ name, point }) => row([name, written(point)]));
    }

    ["pointermove", "click"].forEach((event) => svg.addEventListener(event, point));
    ["pointerleave", "blur"].forEach((event) => svg.addEventListener(event, () => say([])));
    svg.addEventListener("focus", () => svg.matches(":focus-visible") && say([here]));
    svg.addEventListener("keydown", walk);
    new ResizeObserver(draw).observe(controls); // calls at once, too
  }

  document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".kv-chart").forEach(chart));
})();
