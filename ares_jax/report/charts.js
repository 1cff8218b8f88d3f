// Line, scatter and bar charts as SVG. Series differ in dashes or markers, not in colour alone.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b", "#56b4e9", "#1f2933"];
const DASHES = ["", "7 4", "10 3 2 3", "2 3", "4 2", "1 2"];
const SVG = "http://www.w3.org/2000/svg";

// An element; children are text or elements, never markup: what a model wrote stays text.
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(1);
  return String(+value.toPrecision(3));
}

// Round numbers between two bounds, about `wanted` of them and at least `least` apart.
function ticks(low, high, wanted, least = 0) {
  const step = (high - low) / wanted, base = 10 ** Math.floor(Math.log10(step));
  const nice = Math.max(least, base * [1, 2, 5, 10].find((factor) => factor * base >= step));
  const found = [];
  for (let tick = Math.ceil(low / nice) * nice; tick <= high + nice / 1e6; tick += nice) {
    found.push(Math.abs(tick) < nice / 1e6 ? 0 : tick);
  }
  return found;
}

// Axes of a plot; `x` and `y` map values to pixels.
function frame(xs, ys, label) {
  const WIDTH = 400, HEIGHT = 220, left = 50, right = 12, top = 10, bottom = 34;
  const bounds = (values) => {
    let low = Infinity, high = -Infinity;
    for (const value of values) {
      if (value === null) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    return low > high ? [0, 1] : [low, high];
  };
  let [x0, x1] = bounds(xs), [y0, y1] = bounds(ys);
  if (x0 === x1) [x0, x1] = [x0 - 0.5, x1 + 0.5];
  // Rounding errors around 0 are drawn as 0.
  if (Math.max(Math.abs(y0), Math.abs(y1)) < 1e-7) [y0, y1] = [0, 1];
  // A constant gets an axis of its own size, so that no rounding errors are drawn.
  if (y1 - y0 < 1e-6 * Math.max(Math.abs(y0), Math.abs(y1), 1e-3)) {
    const room = 0.1 * Math.abs(y1);
    [y0, y1] = [y0 - room, y1 + room];
  } else {
    // From zero where that costs little of the height.
    if (y0 > 0 && y0 < y1 / 2) y0 = 0;
    y1 += (y1 - y0) * 0.05;
  }
  const x = (value) => left + (value - x0) / (x1 - x0) * (WIDTH - left - right);
  const y = (value) => HEIGHT - bottom - (value - y0) / (y1 - y0) * (HEIGHT - top - bottom);
  const svg = shape("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`});
  for (const value of ticks(y0, y1, 4)) {
    svg.append(shape("line", {x1: left, x2: WIDTH - right, y1: y(value), y2: y(value), stroke: "#e4e7eb"}),
      shape("text", {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, number(value)));
  }
  // x counts steps or tokens, so that its ticks are whole.
  for (const value of ticks(x0, x1, 5, 1)) {
    svg.append(shape("text", {x: x(value), y: HEIGHT - bottom + 16, "text-anchor": "middle"}, String(value)));
  }
  svg.append(shape("line", {x1: left, x2: WIDTH - right, y1: HEIGHT - bottom, y2: HEIGHT - bottom,
    stroke: "#52606d"}),
    shape("text", {x: (WIDTH + left) / 2, y: HEIGHT - 4, "text-anchor": "middle"}, label));
  return {svg, x, y, x0, x1, left, right: WIDTH - right, top, bottom: HEIGHT - bottom};
}

function sample(colour, dash) {
  const svg = shape("svg", {viewBox: "0 0 34 12", "aria-hidden": "true"});
  svg.append(shape("line", {x1: 0, x2: 34, y1: 6, y2: 6, stroke: colour, "stroke-width": 2.5,
    "stroke-dasharray": dash}));
  return svg;
}

function legend(series) {
  const box = element("div", {class: "legend"});
  for (const one of series) box.append(element("span", {}, sample(one.colour, one.dash), " " + one.name));
  return box;
}

// series: [{name, colour, dash, x: [], y: []}], x ascending; null in y is a gap.
function lineChart(title, unit, series) {
  const figure = element("figure", {}, element("h3", {}, title, " ",
    element("span", {class: "note"}, unit)));
  const plot = frame(series.flatMap((one) => one.x), series.flatMap((one) => one.y), "step");
  for (const one of series) {
    let path = "", pen = "M";
    one.y.forEach((value, index) => {
      if (value === null) { pen = "M"; return; }
      path += `${pen}${plot.x(one.x[index]).toFixed(1)} ${plot.y(value).toFixed(1)}`;
      // A single value between gaps is drawn as a dot.
      if (pen === "M") path += "h.01";
      pen = "L";
    });
    plot.svg.append(shape("path", {d: path, fill: "none", stroke: one.colour, "stroke-width": 2,
      "stroke-dasharray": one.dash, "stroke-linecap": "round", "stroke-linejoin": "round"}));
  }
  const readout = element("div", {class: "readout", "aria-live": "polite"});
  const cross = shape("g", {});
  plot.svg.append(cross);
  const steps = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
  let at = steps.length - 1;
  const show = (index) => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at], x = plot.x(step), texts = [];
    cross.replaceChildren(shape("line", {x1: x, x2: x, y1: plot.top, y2: plot.bottom,
      stroke: "#1f2933", "stroke-dasharray": "2 2"}));
    for (const one of series) {
      const value = one.y[one.x.indexOf(step)];
      if (value === undefined) continue;
      texts.push(`${one.name} ${number(value)}`);
      if (value !== null) {
        cross.append(shape("circle", {cx: x, cy: plot.y(value), r: 3.5, fill: one.colour}));
      }
    }
    readout.textContent = `step ${step}: ${texts.join(", ")}`;
  };
  plot.svg.setAttribute("tabindex", "0");
  plot.svg.setAttribute("role", "img");
  plot.svg.setAttribute("aria-label", `${title}, ${steps.length} steps; arrow keys read values`);
  plot.svg.addEventListener("pointermove", (event) => {
    const box = plot.svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * 400;
    const value = plot.x0 + (x - plot.left) / (plot.right - plot.left) * (plot.x1 - plot.x0);
    let best = 0;
    steps.forEach((step, index) => {
      if (Math.abs(step - value) < Math.abs(steps[best] - value)) best = index;
    });
    show(best);
  });
  plot.svg.addEventListener("keydown", (event) => {
    const moves = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1,
      PageUp: at - 10, PageDown: at + 10};
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
  plot.svg.addEventListener("focus", () => show(at));
  figure.append(plot.svg, legend(series), readout);
  return figure;
}

// A mark of one of three forms, so that buckets differ without colour.
function mark(x, y, kind) {
  const look = {fill: "none", stroke: COLOURS[kind], "stroke-width": 1.5, opacity: 0.75};
  if (kind === 0) return shape("circle", {cx: x, cy: y, r: 3.5, ...look});
  if (kind === 1) return shape("rect", {x: x - 3.2, y: y - 3.2, width: 6.4, height: 6.4, ...look});
  return shape("path", {d: `M${x} ${y - 4.5}l4.2 7.5h-8.4z`, ...look});
}

function scatterChart(title, data, buckets) {
  const dots = data.dots, plot = frame(dots.map((dot) => dot[0]), dots.map((dot) => dot[1]),
    "high-window-entropy tokens of a response (N_HE)");
  for (const [x, y, bucket] of dots) plot.svg.append(mark(plot.x(x), plot.y(y), bucket));
  const ends = [plot.x0, plot.x1].map((x) => [plot.x(x), plot.y(data.intercept + data.slope * x)]);
  plot.svg.append(shape("line", {x1: ends[0][0], y1: ends[0][1], x2: ends[1][0], y2: ends[1][1],
    stroke: "#1f2933", "stroke-width": 2}));
  plot.svg.setAttribute("role", "img");
  plot.svg.setAttribute("aria-label", title);
  const box = element("div", {class: "legend"});
  buckets.forEach((name, kind) => {
    const svg = shape("svg", {viewBox: "0 0 34 12", "aria-hidden": "true"});
    svg.append(mark(17, 6, kind));
    box.append(element("span", {}, svg, name));
  });
  return element("figure", {}, element("h3", {}, title), plot.svg, box, element("p", {class: "note"},
    `tokens = ${number(data.intercept)} + ${number(data.slope)} N_HE, r = ${number(data.r)}, ` +
    `${data.n} rollouts`));
}

// groups: [{name, bars: [{name, value, note}]}]; bars of the same name share colour and pattern. The
// name stands above its bars, as names may be long.
function barChart(title, groups) {
  const figure = element("figure", {}, element("h3", {}, title));
  // The group with the most bars has their usual order.
  const names = [...new Set([...groups].sort((a, b) => b.bars.length - a.bars.length)
    .flatMap((group) => group.bars.map((bar) => bar.name)))];
  const most = Math.max(1e-9, ...groups.flatMap((group) => group.bars.map((bar) => bar.value)));
  for (const group of groups) {
    const svg = shape("svg", {viewBox: `0 0 400 ${22 * group.bars.length}`, role: "img",
      "aria-label": `${title}, ${group.name}`});
    group.bars.forEach((bar, row) => {
      const kind = names.indexOf(bar.name), width = Math.max(1, bar.value / most * 130);
      svg.append(shape("rect", {x: 4, y: 22 * row + 3, width, height: 16,
        fill: COLOURS[kind % COLOURS.length], "fill-opacity": 0.35,
        stroke: COLOURS[kind % COLOURS.length], "stroke-width": 1.5,
        "stroke-dasharray": DASHES[kind % DASHES.length]}),
        shape("text", {x: 10 + width, y: 22 * row + 15, class: "value"},
          `${number(bar.value)}${bar.name && ` ${bar.name}`}, ${bar.note}`));
    });
    figure.append(element("div", {class: "bars", title: group.name}, group.name), svg);
  }
  return figure;
}
