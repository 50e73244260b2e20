/** A short visit to try the page with. Nobody in it is real. */

/** @type {[import("./address.js").Seat, string][]} */
export const SAMPLE = [
  ["clinician", "Good morning. What brings you here today?"],
  ["patient", "I have had a headache on the right side for three days. Light makes it worse, and in the mornings I feel sick."],
  ["clinician", "Any fever, a stiff neck, or trouble seeing or speaking?"],
  ["patient", "No fever and no stiff neck. I took ibuprofen 400 mg twice, and it helped a little. At home my blood pressure was 128/82."],
  ["clinician", "On examination over video, face, eyes and speech are normal. I think that this is most likely a migraine."],
  ["clinician", "Please keep a headache diary. We will see each other again in two weeks, or at once if it suddenly gets much worse."],
];
