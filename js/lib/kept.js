/** The newest `most` entries; with a `name` they outlive a reload of the page, in that tab of the browser. */
export class Kept extends Map {
  constructor(most, name) {
    super();
    try {
      for (const [key, value] of JSON.parse(sessionStorage.getItem(name)) ?? []) super.set(key, value);
    } catch {
      // Switched off in this browser, or not of ours.
    }
    Object.assign(this, { most, name });
  }

  set(key, value) {
    this.delete(key);
    super.set(key, value);
    if (this.size > this.most) this.delete(this.keys().next().value);
    const entries = this.name ? [...this] : [];
    // Where there is no room for all, the oldest go.
    for (; entries.length; entries.shift()) {
      try {
        sessionStorage.setItem(this.name, JSON.stringify(entries));
        break;
      } catch {}
    }
    return this;
  }
}
