// The curves of runs, laid out as panels.json says.

// A running mean over the values that are there.
function smoothed(values, width) {
  if (width === 1) return values;
  return values.map((value, index) => {
    if (value === null) return null;
    const near = values.slice(Math.max(0, index - width + 1), index + 1).filter((one) => one !== null);
    return near.reduce((sum, one) => sum + one, 0) / near.length;
  });
}

// Pictures of all runs that have this stage. One run: a colour a curve; several: a colour a run.
function drawCurves(runs, panels, stage, width) {
  const there = runs.filter((run) => run.stages[stage]), figures = [];
  for (const {title, unit, metrics} of panels[stage === "aepo" ? "aepo" : "sft"]) {
    const series = [];
    metrics.forEach(([metric, label], which) => {
      for (const run of there) {
        const curve = run.stages[stage], y = curve.values[metric];
        if (!y || y.every((value) => value === null)) continue;
        const single = runs.length === 1;
        // Validations are steps apart; a line joins them.
        const shown = (value, index) => !metric.startsWith("validate/") || y[index] !== null;
        series.push({name: single ? label : `${run.name} ${label}`, x: curve.step.filter(shown),
          y: smoothed(y.filter(shown), width), dash: DASHES[which],
          colour: COLOURS[(single ? which : runs.indexOf(run)) % COLOURS.length]});
      }
    });
    if (series.length) figures.push(lineChart(title, unit, series));
  }
  return figures;
}
