/* Keys of the whole page, and what begins when it is opened. */

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
    search();
    refresh();
    pictures().focus();
  } else if (event.key === "Enter" && event.target === $("search")) pictures().focus();
  else return;
  event.preventDefault();
}

$("title").textContent = data.title;
buildFilters();
buildCompare();
$("filters").addEventListener("click", (event) => {
  const button = event.target.closest("li button");
  if (!button) return;
  const set = chosen[button.dataset.facet], place = Number(button.dataset.place);
  if (!set.delete(place)) set.add(place);
  refresh();
});
for (const button of document.querySelectorAll(".clear")) button.addEventListener("click", clearFilters);
$("search").addEventListener("input", () => { search(); refresh(); });
$("grid").addEventListener("scroll", draw, { passive: true });
$("grid").addEventListener("keydown", gridKey);
document.addEventListener("pointerdown", () => $("grid").classList.remove("keyed"));
$("cells").addEventListener("click", (event) => {
  const cell = event.target.closest(".cell");
  if (cell) open(Number(cell.dataset.at));
});
$("viewer").addEventListener("keydown", viewerKey);
$("viewer").addEventListener("close", () => {
  $("stage").replaceChildren();
  // The event comes a little later: whoever pressed "/" meanwhile is in the search already.
  if (document.activeElement !== $("search")) pictures().focus();
});
$("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
$("previous").addEventListener("click", () => show(active - 1));
$("next").addEventListener("click", () => show(active + 1));
$("close").addEventListener("click", () => $("viewer").close());
document.addEventListener("keydown", pageKey);
new ResizeObserver(layout).observe($("grid"));
refresh();
pictures().focus({ focusVisible: false });
