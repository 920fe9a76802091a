// Draws the charts that kvneox_lib.pages.interactive describes: lines, a choice of method, panel and place, values on
// pointing at them or by the keyboard. Plain SVG, from the JSON that stands in each chart; nothing is loaded.
"use strict";
(() => {
  const LETTERS = 12, GREY = "#b8b8b8", DASHES = { ":": "1 4", "--": "6 3", "-.": "6 3 1 3" };
  const STYLE = `.kv-chart { position: relative; max-width: 38em; margin: 0 auto; text-align: left; line-height: 1.4 }
    .kv-chart label { display: inline-block; margin: 0 1em .4em 0 } .kv-chart :is(label, select) { font-size: 14px }
    .kv-chart select { max-width: 13em } .kv-chart svg { display: block; width: 100%; overflow: visible }
    .kv-chart text { font-size: ${LETTERS}px; fill: currentColor } .kv-chart :is(table, .tip) { font-size: 13px }
    .kv-chart .tip { position: absolute; pointer-events: none; background: #fffe; color: #111; border: 1px solid #999;
      padding: 2px 6px; max-width: 15em } .kv-chart td { padding: 1px .8em 1px 0 }
    .kv-chart table { width: auto } .kv-chart caption { text-align: left; caption-side: top }`;

  const make = (name, attributes, parent, text) => {
    const made = document.createElementNS(name === "svg" ? "http://www.w3.org/2000/svg" : parent.namespaceURI, name);
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  };

  const ticksOf = (low, high) => {
    const power = 10 ** Math.floor(Math.log10((high - low) / 5));
    const step = [1, 2, 5, 10].map((n) => n * power).find((size) => size >= (high - low) / 5);
    const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
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
    const low = Math.min(0, ...values), high = Math.max(...values), pad = (high - low) * 0.04 || 1;
    const digits = (value) => value.toFixed(data.digits);
    const written = ([, y, from, to]) => digits(y) + (from === null ? "" : ` [${digits(from)}, ${digits(to)}]`);
    const controls = make("div", {}, box), choice = (label, options) => {
      const select = make("select", {}, make("label", {}, controls, `${label} `));
      options.forEach((option, i) => make("option", { value: i }, select, option));
      select.addEventListener("change", draw);
      return select;
    };
    const panels = data.panels.length > 1 && choice("情形", data.panels.map((panel) => panel.title));
    const presses = choice("方法", ["（几种常看的）", ...names]), places = choice(data.xlabel, ["（不列出）", ...xs]);
    const svg = make("svg", { role: "group", "aria-label": `${data.ylabel}与${data.xlabel}` }, box);
    const tip = make("div", { class: "tip", role: "status", hidden: "" }, box), list = make("div", {}, box);

    function draw() {
      const panel = data.panels[panels ? panels.value : 0], chosen = names[presses.value - 1];
      const isFront = (line) => (chosen ? line.name === chosen : line.front), front = panel.lines.filter(isFront);
      const width = Math.max(300, box.clientWidth), height = Math.max(260, Math.min(380, width * 0.6));
      const left = 48, top = 10, bottom = height - 40, middle = (top + bottom) / 2;
      const right = width - 12 - Math.max(50, ...front.map((line) => line.name.length * 0.6 * LETTERS));
      const x = (at) => left + 10 + ((at - xs[0]) / (xs[xs.length - 1] - xs[0] || 1)) * (right - left - 20);
      const y = (value) => bottom - ((value - low + pad) / (high - low + 2 * pad)) * (bottom - top);
      const text = (at, height, anchor, said, more) =>
        make("text", { x: at, y: height, "text-anchor": anchor, ...more }, svg, said);
      svg.replaceChildren();
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      ticksOf(low, high).forEach((value) => {
        make("line", { x1: left, x2: right, y1: y(value), y2: y(value), stroke: "#ddd" }, svg);
        text(left - 5, y(value) + 4, "end", value);
      });
      xs.filter((at, i) => !(x(xs[i + 1]) - x(at) < 26)).forEach((at) => text(x(at), bottom + 16, "middle", at));
      text((left + right) / 2, height - 6, "middle", data.xlabel);
      text(12, middle, "middle", data.ylabel, { transform: `rotate(-90 12 ${middle})` });
      [...panel.lines].sort((a, b) => isFront(a) - isFront(b)).forEach((line) => drawLine(line, isFront(line), x, y));
      const ends = front.map((line) => line.points[line.points.length - 1]);
      apart(ends.map((end) => y(end[1])), LETTERS + 2, top, bottom).forEach((place, i) => {
        const leader = { x1: x(ends[i][0]) + 5, y1: y(ends[i][1]), x2: right + 4, y2: place, stroke: GREY };
        make("line", { ...leader, "stroke-dasharray": "1 2" }, svg);
        text(right + 6, place + 4, "start", front[i].name, { style: `fill: ${front[i].letters}` });
      });
      listValues(panel, xs[places.value - 1]);
    }

    function drawLine(line, isFront, x, y) {
      const stroke = isFront ? line.colour : GREY, dash = { "stroke-dasharray": DASHES[line.dash] || "none" };
      const path = line.points.map(([at, value]) => `${x(at)} ${y(value)}`).join("L");
      make("path", { d: `M${path}`, fill: "none", stroke, "stroke-width": isFront ? 2 : 1, ...dash }, svg);
      line.points.forEach((point) => {
        const [at, value, from, to] = point, said = `${line.name}，${data.xlabel} ${at}：${written(point)}`;
        const transform = `translate(${x(at)} ${y(value)})`, mark = { d: line.marker, "stroke-width": 0.15, stroke };
        if (isFront && from !== null) make("path", { d: `M${x(at)} ${y(from)}V${y(to)}`, stroke }, svg);
        mark.fill = line.hollow ? "#fff" : stroke;
        if (isFront) make("path", { ...mark, transform: `${transform} scale(8)` }, svg);
        const known = isFront ? { tabindex: 0, role: "img", "aria-label": said } : {};
        const where = { "data-press": line.name, "data-at": at, r: 9, transform, fill: "transparent" };
        const target = make("circle", { ...where, ...known }, svg);
        const show = () => {
          Object.assign(tip, { textContent: said, hidden: false });
          tip.style.left = `${Math.max(0, Math.min(x(at) + 8, box.clientWidth - tip.offsetWidth))}px`;
          tip.style.top = `${svg.getBoundingClientRect().top - box.getBoundingClientRect().top + y(value) + 12}px`;
        };
        ["pointerenter", "click", "focus"].forEach((event) => target.addEventListener(event, show));
        ["pointerleave", "blur"].forEach((event) => target.addEventListener(event, () => (tip.hidden = true)));
      });
    }

    function listValues(panel, at) {
      const found = panel.lines.flatMap((line) => line.points.map((point) => ({ name: line.name, point })));
      const rows = found.filter(({ point }) => point[0] === at);
      rows.sort((a, b) => (data.lowest_first ? 1 : -1) * (a.point[1] - b.point[1]));
      list.replaceChildren();
      if (!rows.length) return;
      const table = make("table", {}, list), where = `${panel.title} ${data.xlabel} ${at}`.trim();
      make("caption", {}, table, `${where}：${data.ylabel}，方括号里是 95 % 区间`);
      rows.forEach(({ name, point }) => {
        const row = make("tr", {}, table);
        [name, written(point)].forEach((cell) => make("td", {}, row, cell));
      });
    }

    new ResizeObserver(draw).observe(controls); // calls at once, too
  }

  document.addEventListener("DOMContentLoaded", () => {
    make("style", {}, document.head, STYLE);
    document.querySelectorAll(".kv-chart").forEach(chart);
  });
})();
