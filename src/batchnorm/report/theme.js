const $ = id => document.getElementById(id);
const views = {};
const dark = matchMedia("(prefers-color-scheme: dark)");

function theme() {
  const ink = dark.matches ? "#c9d0d8" : "#46505c", line = dark.matches ? "#3a424c" : "#e3e7eb";
  const text = {labelColor: ink, titleColor: ink};
  return {background: "transparent", font: "system-ui, sans-serif", view: {stroke: null},
    axis: {...text, gridColor: line, domainColor: line, tickColor: line, labelFontSize: 12, labelOverlap: true},
    legend: {...text, labelFontSize: 12, titleFontSize: 12, labelLimit: 240}, header: {...text, labelFontSize: 13}};
}
