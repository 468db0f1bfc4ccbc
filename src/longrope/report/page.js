"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const places = [...document.querySelectorAll("[data-figure]")];
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const themes = {
    light: { ink: "#1c1e21", line: "#dedfdc", panel: "#ffffff" },
    dark: { ink: "#e8e6e3", line: "#33373d", panel: "#1d2024" },
  };
  const colours = (theme) => ({
    "font.color": theme.ink,
    "font.family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
    "xaxis.gridcolor": theme.line,
    "xaxis.linecolor": theme.line,
    "yaxis.gridcolor": theme.line,
    "yaxis.linecolor": theme.line,
    "hoverlabel.bgcolor": theme.panel,
    "hoverlabel.font.color": theme.ink,
  });
  const themeName = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const screen = () => colours(themes[themeName()]);
  const first = (place) => figures[place.dataset.figure].layout;
  const repaint = (change) => places.forEach((place) => Plotly.relayout(place, change(place)));

  for (const place of places) {
    const { data, layout } = structuredClone(figures[place.dataset.figure]);
    Plotly.newPlot(place, data, layout, { displayModeBar: false, responsive: true });
  }
  repaint(screen);

  const theme = document.getElementById("theme");
  const nameTheme = () => (theme.textContent = themeName() === "dark" ? "light" : "dark");
  theme.addEventListener("click", () => {
    root.dataset.theme = themeName() === "dark" ? "light" : "dark";
    nameTheme();
    repaint(screen);
  });
  dark.addEventListener("change", () => {
    nameTheme();
    repaint(screen);
  });
  nameTheme();
  theme.hidden = false;

  // A shape stands at its value on any axis, a note on a logarithmic one at the logarithm.
  const switchAxis = (place, axis) => {
    const name = `${axis}axis`;
    const log = place.layout[name].type !== "log";
    const ours = first(place)[name];
    const own = (ours.type === "log") === log;
    const notes = (place.layout.annotations || []).map((note) =>
      note[`${axis}ref`] ? note : { ...note, [axis]: log ? Math.log10(note[axis]) : 10 ** note[axis] },
    );
    Plotly.relayout(place, {
      [`${name}.type`]: log ? "log" : "linear",
      [`${name}.autorange`]: true,
      [`${name}.tickmode`]: (own && ours.tickmode) || null,
      [`${name}.dtick`]: (own && ours.dtick) || null,
      annotations: notes,
    });
    return log;
  };
  for (const button of document.querySelectorAll("[data-axis]")) {
    const place = button.closest("figure").querySelector("[data-figure]");
    button.setAttribute("aria-pressed", first(place)[`${button.dataset.axis}axis`].type === "log");
    button.addEventListener("click", () => button.setAttribute("aria-pressed", switchAxis(place, button.dataset.axis)));
    button.hidden = false;
  }

  // Paper is white and narrower than a screen, whatever the screen.
  const paper = (place) => ({ ...colours(themes.light), width: 680, height: Math.min(first(place).height, 330) });
  const back = (place) => ({ ...screen(), width: null, height: first(place).height, autosize: true });
  addEventListener("beforeprint", () => repaint(paper));
  addEventListener("afterprint", () => repaint(back));
})();
