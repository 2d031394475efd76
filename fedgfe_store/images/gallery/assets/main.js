/* Keys of the whole page, and what begins when it is opened. */

/** Typing is one step of the history, from the first key of a search to its last. */
function searched() {
  search();
  refresh();
  if (searching) change();
  else step();
  searching = true;
}
let searching = false;

function pageKey(event) {
  const typing = event.target.matches("input, select");
  if (event.ctrlKey || event.metaKey || event.altKey || $("viewer").open) return;
  if (event.key === "/" && !typing) {
    $("search").focus();
    $("search").select();
  } else if (event.key.toLowerCase() === "c" && !typing && !$("compare").disabled) $("compare").click();
  else if (event.key.toLowerCase() === "m" && !typing && map) map.toggle.click();
  else if (event.key === "Escape" && event.target === $("search")) {
    $("search").value = "";
    searched();
    pictures().focus();
  } else if (event.key === "Enter" && event.target === $("search")) pictures().focus();
  else return;
  event.preventDefault();
}

$("title").textContent = data.title;
buildFilters();
buildCompare();
buildViewer();
for (const button of document.querySelectorAll(".clear")) button.addEventListener("click", clearFilters);
$("search").addEventListener("input", searched);
$("search").addEventListener("blur", () => { searching = false; });
$("grid").addEventListener("scroll", draw, { passive: true });
$("grid").addEventListener("keydown", gridKey);
document.addEventListener("pointerdown", () => $("grid").classList.remove("keyed"));
$("cells").addEventListener("click", (event) => {
  const cell = event.target.closest(".cell");
  if (cell) openStep(Number(cell.dataset.at));
});
document.addEventListener("keydown", pageKey);
new ResizeObserver(layout).observe($("grid"));
pictures().focus({ focusVisible: false });
follow(true);
whenIdle(() => prepareSearch());
