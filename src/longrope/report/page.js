"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const places = [...document.querySelectorAll("[data-figure]")];
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
  const screen = () => colours(dark.matches ? themes.dark : themes.light);
  const repaint = (change) => places.forEach((place) => Plotly.relayout(place, change));

  for (const place of places) {
    const { data, layout } = figures[place.dataset.figure];
    Plotly.newPlot(place, data, layout, { displayModeBar: false, responsive: true });
  }
  repaint(screen());
  dark.addEventListener("change", () => repaint(screen()));
  // Paper is white and narrower than a screen, whatever the screen.
  addEventListener("beforeprint", () => repaint({ ...colours(themes.light), width: 680, height: 330 }));
  addEventListener("afterprint", () => repaint({ ...screen(), width: null, height: 400, autosize: true }));
})();
