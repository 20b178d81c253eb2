const options = {actions: false, renderer: "svg"};
const views = {};
const ready = Object.keys(specs).map(name => vegaEmbed("#" + name, specs[name], options)
  .then(embedded => { views[name] = embedded.view; }));
const rate = document.getElementById("rate");
function showRate() {
  for (const name of ["histogram", "with", "without"])
    views[name].signal("rate", Number(rate.value)).runAsync();
}
Promise.all(ready).then(() => { rate.addEventListener("change", showRate); showRate(); })
  .catch(console.error);
