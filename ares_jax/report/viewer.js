// Shows a response token by token. Bits of a token's marks: flagged, inside a window, trigger word.
const FLAG = 1, COVER = 2, TRIGGER = 4;

// Further tokens are drawn on request, so that a page of ten long answers stays quick.
const AT_ONCE = 4000;

function tokenSpan(text, entropy, marks, scale) {
  const names = [[FLAG, "flag"], [COVER, "cover"], [TRIGGER, "trigger"]]
    .filter(([bit]) => marks & bit).map(([, name]) => name).join(" ");
  const span = element("span", names ? {class: names} : {}, text);
  const strength = Math.min(1, entropy / 1000 / scale);
  if (strength > 0.02) span.style.backgroundColor = `rgba(var(--tint), ${strength.toFixed(2)})`;
  return span;
}

function describe(response, index) {
  const marks = Number(response.marks[index]), mean = response.mean[index];
  const parts = [`token ${index + 1} of ${response.tokens.length}`,
    JSON.stringify(response.tokens[index]), response.entropy[index] === null
      ? "entropy not finite" : `entropy ${number(response.entropy[index] / 1000)} nats`];
  if (mean !== null) parts.push(`its window's mean ${number(mean / 1000)}` +
    (response.tau === null ? "" : ` against tau ${number(response.tau)}`));
  if (marks & FLAG) parts.push("HWE token");
  if (marks & COVER) parts.push("inside an HWE window");
  if (marks & TRIGGER) parts.push("trigger word (V_sem)");
  return parts.join(", ");
}

// The tokens of a response. A pointer or the arrow keys choose one; its numbers are shown below.
function tokenBox(response, scale) {
  const box = element("div", {class: "tokens", tabindex: "0", role: "group",
    "aria-label": "Tokens of the response; arrow keys read each one's numbers"});
  const readout = element("div", {class: "readout", "aria-live": "polite"});
  let drawn = 0, at = -1;
  const more = element("button", {type: "button"});
  const draw = (count) => {
    const part = document.createDocumentFragment();
    const end = Math.min(response.tokens.length, drawn + count);
    for (; drawn < end; drawn++) {
      part.append(tokenSpan(response.tokens[drawn], response.entropy[drawn],
        Number(response.marks[drawn]), scale));
    }
    box.append(part);
    more.textContent = `Show ${response.tokens.length - drawn} more tokens`;
    more.hidden = drawn === response.tokens.length;
  };
  const choose = (index) => {
    if (drawn === 0) return;
    if (at >= 0) box.children[at].classList.remove("at");
    at = Math.max(0, Math.min(drawn - 1, index));
    box.children[at].classList.add("at");
    readout.textContent = describe(response, at);
  };
  more.addEventListener("click", () => draw(AT_ONCE));
  box.addEventListener("pointerover", (event) => {
    const index = [...box.children].indexOf(event.target);
    if (index >= 0) choose(index);
  });
  box.addEventListener("keydown", (event) => {
    const moves = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: drawn - 1};
    if (!(event.key in moves)) return;
    event.preventDefault();
    choose(moves[event.key]);
  });
  draw(AT_ONCE);
  return [box, readout, more];
}

// The same without colour: entropies as bars, window means as a line, tau as a dashed line.
// All responses have one scale, so that two of them can be compared.
function strip(response, scale) {
  const count = response.tokens.length;
  const most = Math.max(1000 * scale, 1100 * (response.tau || 0), ...response.entropy.slice(0, 2e4));
  const y = (value) => (68 - value / most * 62).toFixed(1), x = (index) => (index / count * 600).toFixed(1);
  const svg = shape("svg", {viewBox: "0 0 600 70", preserveAspectRatio: "none", class: "strip",
    role: "img", "aria-label": "Entropy of every token, window means and their threshold"});
  let bars = "", line = "", pen = "M";
  for (let index = 0; index < count; index++) {
    bars += `M${x(index)} 68V${y(response.entropy[index])}H${x(index + 0.8)}V68z`;
    const mean = response.mean[index];
    if (mean === null) { pen = "M"; continue; }
    line += `${pen}${x(index + 0.4)} ${y(mean)}`;
    pen = "L";
  }
  const still = {"vector-effect": "non-scaling-stroke", fill: "none"};
  svg.append(shape("path", {d: bars, fill: "#e69f00"}),
    shape("path", {d: line, stroke: "#0072b2", "stroke-width": 2, ...still}));
  if (response.tau !== null) {
    const height = y(1000 * response.tau);
    svg.append(shape("line", {x1: 0, x2: 600, y1: height, y2: height, stroke: "#b3261e",
      "stroke-width": 1.5, "stroke-dasharray": "6 4", ...still}));
  }
  return svg;
}

function facts(response, data) {
  const rows = [["length", `${response.tokens.length} tokens`],
    ["bucket", `${data.buckets[response.bucket]} (${number(100 * response.rate)}% of the group correct)`],
    ["format", response.format_ok ? "ok" : "not ok"],
    ["tau", response.tau === null ? "none yet" : `${number(response.tau)} nats` +
      (response.held_out ? ", the run's last" : "")],
    ["N_HE", number(response.count)]];
  const reward = response.reward;
  if (reward) {
    rows.push(["target", number(reward.target)], ["lambda", number(reward.multiplier)],
      ["reward", `${number(reward.total)} = accuracy ${number(reward.accuracy)} ` +
        `${reward.shaping < 0 ? "−" : "+"} shaping ${number(Math.abs(reward.shaping))}`],
      ["advantage", response.advantage === null ? "its group was not logged as a whole" : number(response.advantage)],
      ["KL weight", `${number(reward.kl_outside)} outside windows, ${number(reward.kl_inside)} inside`]);
  }
  const list = element("dl", {});
  for (const [name, value] of rows) list.append(element("dt", {}, name), element("dd", {}, value));
  return list;
}

// The answers of a rollout's group side by side: verdict, reward, advantage, length.
function groupTable(response, data) {
  const group = data.responses.filter((one) => !one.held_out && !response.held_out &&
    one.step === response.step && one.id === response.id);
  if (group.length < 2) return [];
  const cells = (name, text) => element("tr", {}, element("th", {}, name), ...group.map((one) =>
    element("td", one === response ? {class: "this"} : {}, text(one))));
  return [element("div", {class: "group"}, element("table", {},
    cells("sample", (one) => String(one.sample)), cells("answer", (one) => one.correct ? "✓" : "✗"),
    cells("reward", (one) => number(one.reward.total)),
    cells("advantage", (one) => number(one.advantage)),
    cells("tokens", (one) => String(one.tokens.length))))];
}

function card(response, data) {
  const problem = data.problems[response.id];
  const verdict = response.correct ? "right" : "wrong";
  const where = response.held_out ? `held out, after ${response.stage}` : `${response.stage} step ${response.step}`;
  const title = element("header", {}, element("h3", {}, where),
    element("span", {class: `verdict ${verdict}`}, response.correct ? "correct" : "wrong"),
    element("span", {}, data.buckets[response.bucket]),
    element("span", {class: "note"}, `${response.id}, sample ${response.sample}`));
  const question = element("div", {class: "question"});
  problem.images.forEach((image, index) => question.append(image === null
    ? element("div", {class: "note"}, `image ${index + 1} is missing`)
    : element("img", {src: data.images[image], alt: `Image ${index + 1} of the problem`})));
  question.append(element("div", {}, problem.question,
    element("div", {class: "note"}, `answer: ${problem.answer}`)));
  return element("article", {class: "card"}, title, element("div", {class: "body"},
    element("div", {}, question, ...tokenBox(response, data.scale), strip(response, data.scale),
      ...groupTable(response, data)),
    facts(response, data)));
}
