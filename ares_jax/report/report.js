// Fills the page from its data, and redraws it when the reader chooses something.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const PAGE = 10;

function options(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => element("option", {value}, text)));
}

function begin() {
  document.title = at("name").textContent = `Report of ${data.runs.map((run) => run.name).join(", ")}`;
  beginOverview();
  const shown = data.responses.length;
  at("summary").textContent = `${shown} of ${data.logged} logged responses are on this page` +
    (shown < data.logged ? "; they come from evenly spaced iterations, so that the file stays small." : ".");
  beginCurves();
  beginPictures();
  beginPair();
  beginResponses();
}

function beginOverview() {
  const {results, facts, settings} = data.overview;
  if (results.length) at("overview").append(table(results));
  const list = element("dl", {});
  for (const [name, text] of facts) list.append(element("dt", {}, name), element("dd", {}, text));
  at("overview").append(list);
  if (settings.length) at("settings").querySelector("div").append(table(settings));
  at("notes").append(...data.notes.map((note) => element("li", {}, `Left out: ${note}`)));
}

// The first row is the head if the table has more than two columns.
function table(rows) {
  const head = rows[0].length > 2 ? 1 : 0;
  return element("table", {}, ...rows.map((row, index) => element("tr", {},
    ...row.map((text) => element(index < head ? "th" : "td", {}, text)))));
}

// Pictures below their titles, which fold them; on a phone only the first one is open.
const PHONE = window.matchMedia("(max-width: 720px)").matches;
function folds(figures) {
  return figures.map((figure, index) => {
    const fold = element("details", PHONE && index ? {} : {open: ""},
      element("summary", {}, figure.querySelector("h3")));
    fold.append(figure);
    return fold;
  });
}

function beginCurves() {
  const stages = ["aepo", "adacs", "warmup"].filter((stage) => data.runs.some((run) => run.stages[stage]));
  options(at("stage"), stages.map((stage) => [stage, stage]));
  if (data.runs.length > 1) {
    at("runs").append(...data.runs.map((run, index) =>
      element("span", {}, sample(COLOURS[index % COLOURS.length], ""), ` ${run.name}`)));
  }
  const draw = () => at("panels").replaceChildren(
    ...folds(drawCurves(data.runs, data.panels, at("stage").value, Number(at("smooth").value))));
  at("curve-form").addEventListener("change", draw);
  if (stages.length) draw();
}

function beginPictures() {
  const box = at("pictures");
  if (data.scatter) box.append(scatterChart("Length against N_HE", data.scatter, data.buckets));
  if (data.difficulty.length) {
    const of = (key) => data.difficulty.map((part) => ({name: part.bucket,
      bars: [{name: "", value: part[key], note: `n = ${part.n}`}]}));
    box.append(barChart("Mean token entropy by difficulty, nats", of("entropy")),
      barChart("N_HE by difficulty, tokens a response", of("count")));
  }
  for (const run of data.runs) {
    for (const [kind, what] of [["bucket", "difficulty"], ["level", "level"]]) {
      const groups = Object.entries(run.results[kind]).map(([name, stages]) => ({name, bars:
        Object.entries(stages).map(([stage, part]) => ({name: stage, value: part.length,
          note: `${number(100 * part.accuracy)}% correct, n = ${part.n}`}))}));
      if (groups.length) box.append(barChart(
        `Tokens by ${what} after each stage, held out` + (data.runs.length > 1 ? `, ${run.name}` : ""), groups));
    }
  }
  box.replaceChildren(...folds([...box.children]));
  if (!box.children.length) box.append(element("p", {class: "note"}, "There are no responses yet."));
}

// Lets the reader choose a problem that was answered at several times, and two of its answers.
function beginPair() {
  const times = new Map();
  for (const response of data.responses) {
    if (!times.has(response.id)) times.set(response.id, []);
    times.get(response.id).push(response);
  }
  const when = (response) => `${response.held_out}/${response.stage}/${response.step}`;
  const several = [...times.keys()].filter((id) => new Set(times.get(id).map(when)).size > 1);
  if (!several.length) {
    at("compare-form").hidden = true;
    at("pair").append(element("p", {class: "note"}, "No problem was answered twice yet."));
    return;
  }
  options(at("problem"), several.map((id) => [id, `${id}: ${data.problems[id].question.slice(0, 60)}`]));
  const choose = () => {
    const answers = times.get(at("problem").value);
    const names = answers.map((one, index) => [index,
      `${one.held_out ? "after " + one.stage : `${one.stage} step ${one.step}`}, sample ${one.sample}`]);
    options(at("left"), names);
    options(at("right"), names);
    const [left, right] = chosenPair(answers, when);
    at("left").value = String(left);
    at("right").value = String(right);
    draw();
  };
  const draw = () => at("pair").replaceChildren(...["left", "right"].map(
    (side) => card(times.get(at("problem").value)[Number(at(side).value)], data)));
  // It opens on a problem that was wrong at first and right at last.
  const learnt = several.find((id) => {
    const [left, right] = chosenPair(times.get(id), when).map((index) => times.get(id)[index]);
    return !left.correct && right.correct;
  });
  if (learnt !== undefined) at("problem").value = learnt;
  at("problem").addEventListener("change", choose);
  at("left").addEventListener("change", draw);
  at("right").addEventListener("change", draw);
  choose();
}

// Two answers of a problem, by index: one of the first time and one of the last, wrong and right if
// there are such, of the same sample if possible.
function chosenPair(answers, when) {
  const of = (time) => answers.map((one, index) => index).filter((index) => when(answers[index]) === time);
  const first = of(when(answers[0])), last = of(when(answers[answers.length - 1]));
  const pairs = first.flatMap((left) => last.map((right) => [left, right]));
  const score = ([left, right]) => 2 * (!answers[left].correct && answers[right].correct) +
    (answers[left].sample === answers[right].sample);
  return pairs.reduce((best, pair) => score(pair) > score(best) ? pair : best);
}

function beginResponses() {
  const key = [["so", 0, 0], ["but", 1000 * data.scale, 0], ["maybe", 700 * data.scale, FLAG | COVER],
    ["wait", 200 * data.scale, TRIGGER]].map(([text, entropy, marks]) =>
    element("span", {class: "tokens"}, tokenSpan(text, entropy, marks, data.scale)));
  at("key").append("Tokens: ", key[0], " certain, ", key[1],
    ` entropy of ${number(data.scale)} nats or more, `, key[2],
    ` start of a high-entropy window of ${data.window} tokens (underlined), `, key[3],
    " trigger word. Below each response: entropies as bars, window means as a line, tau dashed.");
  const sources = [...new Set(data.responses.map((one) => one.held_out ? `held out, ${one.stage}` : "rollouts"))];
  options(at("from"), [["", "all"], ...sources.map((name) => [name, name])]);
  const steps = [...new Set(data.responses.filter((one) => !one.held_out).map((one) => one.step))];
  options(at("step"), [["", "all"], ...steps.map((step) => [step, step])]);
  options(at("bucket"), [["", "all"], ...data.buckets.map((name, index) => [index, name])]);
  let page = 0, chosen = [];
  const choose = () => {
    const [from, step, bucket, verdict] = ["from", "step", "bucket", "verdict"].map((id) => at(id).value);
    const wanted = at("words").value.toLowerCase();
    chosen = data.responses.filter((one) =>
      (from === "" || from === (one.held_out ? `held out, ${one.stage}` : "rollouts")) &&
      (step === "" || (!one.held_out && String(one.step) === step)) &&
      (bucket === "" || String(one.bucket) === bucket) &&
      (verdict === "" || String(one.correct) === verdict) &&
      (wanted === "" || one.tokens.join("").toLowerCase().includes(wanted) ||
        data.problems[one.id].question.toLowerCase().includes(wanted)));
    page = 0;
    draw();
  };
  const draw = () => {
    const pages = Math.max(1, Math.ceil(chosen.length / PAGE));
    at("found").textContent = `${chosen.length} responses`;
    at("where").textContent = `page ${page + 1} of ${pages}`;
    at("previous").disabled = page === 0;
    at("next").disabled = page === pages - 1;
    at("cards").replaceChildren(...chosen.slice(PAGE * page, PAGE * (page + 1)).map((one) => card(one, data)));
  };
  const turn = (by) => {
    page += by;
    draw();
    at("responses").scrollIntoView();
  };
  at("filters").addEventListener("input", choose);
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("previous").addEventListener("click", () => turn(-1));
  at("next").addEventListener("click", () => turn(1));
  choose();
}

begin();
