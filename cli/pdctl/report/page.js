// Draws every chart in the page's colours, again when those change, and in light ones for paper.
"use strict";
(() => {
  const options = JSON.parse(document.getElementById("options").textContent);
  const select = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const palettes = {
    light: {
      series: ["#0550ae", "#b35900", "#116329", "#8250df", "#a40e26", "#57606a"],
      heat: ["#f3f8fd", "#b9d7f5", "#7fb6ee"],
    },
    dark: {
      series: ["#79c0ff", "#ffa657", "#56d364", "#d2a8ff", "#ff8182", "#9da7b3"],
      heat: ["#10161f", "#173a6b", "#1d53a6"],
    },
  };
  const drawn = [];

  function coloured(option, theme, width) {
    const style = getComputedStyle(document.documentElement);
    const front = style.getPropertyValue("--front").trim();
    const quiet = style.getPropertyValue("--quiet").trim();
    const line = style.getPropertyValue("--line").trim();
    const back = style.getPropertyValue("--back").trim();
    const made = structuredClone(option);
    const palette = palettes[theme];
    const names = [...new Set(made.series.map((one) => one.name))];
    made.color = palette.series;
    made.backgroundColor = "transparent";
    made.animation = false;
    made.textStyle = { color: front, fontFamily: "system-ui, sans-serif", fontSize: 12 };
    made.tooltip = { ...made.tooltip, backgroundColor: back, borderColor: line, textStyle: { color: front }, confine: true };
    if (made.legend) made.legend = { ...made.legend, textStyle: { color: front }, inactiveColor: quiet, pageTextStyle: { color: front }, pageIconColor: front };
    for (const axis of [made.xAxis, made.yAxis]) {
      axis.axisLabel = { color: front, hideOverlap: true, ...axis.axisLabel };
      axis.nameTextStyle = { color: quiet, align: axis === made.yAxis ? "left" : "center" };
      axis.axisLine = { lineStyle: { color: line } };
      axis.splitLine = { show: axis.type !== "category", lineStyle: { color: line } };
      if (axis.splitArea) axis.splitArea = { show: false };
    }
    if (made.visualMap) Object.assign(made.visualMap, { inRange: { color: palette.heat }, textStyle: { color: front } });
    // colours go by name, so that a run's line and dots look alike
    for (const one of made.series) {
      const colour = palette.series[Math.max(0, names.indexOf(one.name)) % palette.series.length];
      if (one.type !== "heatmap") one.itemStyle = { color: colour, ...one.itemStyle };
      if (one.type === "line") one.lineStyle = { width: 2, color: colour, type: ["solid", "dashed", "dotted"][names.indexOf(one.name) % 3], ...one.lineStyle };
      if (one.type === "heatmap") one.label = { ...one.label, color: front };
      if (one.type === "bar" && one.label) one.label = { ...one.label, color: back };
    }
    if (made.legend) {
      // the legend wraps; what is below it begins where it ends
      const rows = Math.ceil(names.reduce((sum, name) => sum + name.length * 7 + 45, 0) / width);
      made.grid = { ...made.grid, top: 32 + 22 * rows };
    }
    return made;
  }

  function theme() {
    return select.value === "auto" ? (system.matches ? "dark" : "light") : select.value;
  }

  function draw(wished) {
    document.documentElement.dataset.theme = wished;
    drawn.splice(0).forEach((chart) => chart.dispose());
    for (const place of document.querySelectorAll("[data-chart]")) {
      const chart = echarts.init(place, null, { renderer: "svg" });
      chart.setOption(coloured(options[place.dataset.chart], wished, place.clientWidth));
      drawn.push(chart);
    }
  }

  select.addEventListener("change", () => draw(theme()));
  system.addEventListener("change", () => draw(theme()));
  let width = document.body.clientWidth;
  addEventListener("resize", () => requestAnimationFrame(() => {
    const now = document.body.clientWidth;
    if (now === width || now < 150) return; // phones resize the window when their bars come and go; a sliver shows nothing
    width = now;
    draw(document.documentElement.dataset.theme);
  }));
  addEventListener("beforeprint", () => draw("light"));
  addEventListener("afterprint", () => draw(theme()));
  draw(theme());
})();
